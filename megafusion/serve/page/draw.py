"""The tab that draws a text."""

from collections.abc import AsyncGenerator
from typing import Any

import gradio as gr

from megafusion.generate.arguments import as_integer
from megafusion.serve.page.parts import Controls, Page, Update, file_name, progress
from megafusion.serve.page.render import grid

MAX_IMAGES = 8


def draw_tab(page: Page) -> gr.Textbox:
    """Lay the tab out in the layout that is open. Returns its prompt, for other tabs to fill."""
    most = min(MAX_IMAGES, page.worker.config.max_batch)
    with gr.Row():
        prompt = gr.Textbox(
            label="Prompt", placeholder="red apple, 3d style", max_lines=4, scale=5, elem_id="prompt"
        )
        count = gr.Slider(1, most, min(4, most), step=1, label="Images", min_width=160, elem_id="count")
    if page.captions:
        gr.Examples([[caption] for caption in page.captions], [prompt], label="Captions that the model knows")
    controls = Controls("Draw")
    images = gr.HTML(elem_id="images")

    async def draw(text: str, number: int, entries: list, *values: Any) -> AsyncGenerator[Update]:
        """Draw a prompt several times, each with the next seed."""
        options = page.settings.read(values)
        prompts = [[page.text(text, "Prompt", page.content())]]
        seeds = range(options.seed, options.seed + as_integer("Images", number, 1, most))
        labels, names = [f"seed {seed}" for seed in seeds], [file_name(text, seed) for seed in seeds]
        yield {page.settings.seed: options.seed}
        async for answers in page.answers(prompts * len(seeds), options, "image"):
            yield {images: grid(answers, labels, names), controls.status: progress(answers)}
        for answer, label, name in zip(answers, labels, names, strict=True):
            entries = page.gallery.add(entries, answer.images[0], name, f"{text}, {label}")
        yield page.gallery.show(entries)

    controls.wire(
        draw,
        [prompt, count, page.gallery.entries, *page.settings.inputs],
        [images, page.settings.seed, *page.gallery.outputs],
        "draw",
        also=[prompt.submit],
    )
    return prompt
