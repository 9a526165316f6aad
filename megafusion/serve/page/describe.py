"""The tab that describes an image."""

from collections.abc import AsyncGenerator
from typing import Any

import gradio as gr

from megafusion.serve.page.parts import Controls, Page, Update, image_file, progress


def describe_tab(page: Page, prompt: gr.Textbox) -> gr.Image:
    """Lay the tab out in the layout that is open. prompt: of the tab that draws. Returns its image."""
    with gr.Row():
        with gr.Column():
            image = image_file("describe-image")
        with gr.Column():
            caption = gr.Textbox(
                label="Caption", lines=5, interactive=False, buttons=["copy"], elem_id="caption"
            )
            controls = Controls("Describe")
            again = gr.Button("Draw this caption", size="sm")

    async def describe(file: Any, *values: Any) -> AsyncGenerator[Update]:
        """Describe an image."""
        options = page.settings.read(values)
        document = [await page.load(file, page.content())]
        yield {page.settings.seed: options.seed}
        async for (answer,) in page.answers([document], options, "text", max_images=0):
            yield {caption: answer.text, controls.status: progress([answer])}

    controls.wire(describe, [image, *page.settings.inputs], [caption, page.settings.seed], "describe")
    outputs: list[Any] = [prompt, page.tabs]
    again.click(lambda text: (text, gr.Tabs(selected="draw")), caption, outputs, api_visibility="private")
    return image
