"""The tab that edits an image."""

from collections.abc import AsyncGenerator
from typing import Any

import gradio as gr

from megafusion.generate.row import Part
from megafusion.serve.errors import Refusal
from megafusion.serve.page.parts import Controls, Page, Update, file_name, image_file, progress
from megafusion.serve.page.render import turn


def edit_tab(page: Page) -> gr.Image:
    """Lay the tab out in the layout that is open. Returns its image, for other tabs to fill."""
    with gr.Row():
        with gr.Column():
            image = image_file("edit-image")
        with gr.Column():
            edited = gr.HTML('<div class="mf-frame mf-empty"></div>', elem_id="edited")
    with gr.Row():
        instruction = gr.Textbox(
            label="Instruction",
            placeholder="make it flat style:",
            info="A model that was not trained on edits draws something else.",
            scale=3,
            elem_id="instruction",
        )
        may_write = gr.Checkbox(
            True, label="let the model write first", info="As models do whose edits came with captions."
        )
    controls = Controls("Edit")
    again = gr.Button("Edit the result", size="sm")

    async def edit(file: Any, text: str, writes: bool, entries: list, *values: Any) -> AsyncGenerator[Update]:
        """Draw an image anew as an instruction tells."""
        options = page.settings.read(values)
        content = page.content()
        document: list[Part] = [await page.load(file, content), page.text(text, "Instruction", content)]
        name = file_name(text, options.seed)
        yield {page.settings.seed: options.seed}
        async for (answer,) in page.answers([document], options, "free" if writes else "image"):
            yield {edited: turn(answer, name), controls.status: progress([answer])}
        if not answer.images:
            raise Refusal(
                422,
                "The model ended without an image: it may not be trained on edits. "
                f"Untick '{may_write.label}' to have it draw at once",
            )
        entries = page.gallery.add(entries, answer.images[0], name, f"{text} seed {options.seed}")
        yield page.gallery.show(entries)

    controls.wire(
        edit,
        [image, instruction, may_write, page.gallery.entries, *page.settings.inputs],
        [edited, page.settings.seed, *page.gallery.outputs],
        "edit",
        also=[instruction.submit],
    )
    again.click(page.gallery.newest, page.gallery.entries, image, api_visibility="private")
    return image
