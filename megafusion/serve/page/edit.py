"""The tab that edits an image."""

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from megafusion.errors import UserError
from megafusion.serve.page.parts import Controls, ImageFile, Page, Update, file_name, image_file, progress
from megafusion.serve.page.render import turn


def edit_tab(page: Page) -> ImageFile:
    """Lay the tab out in the layout that is open. Returns its image, for other tabs to fill."""
    with gr.Row():
        with gr.Column():
            image = image_file("edit-image")
        with gr.Column():
            edited = gr.HTML(elem_id="edited")
    instruction = gr.Textbox(
        label="Instruction",
        placeholder="make it flat style:",
        info="A model that was not trained on edits draws something else.",
        elem_id="instruction",
    )
    may_write = gr.Checkbox(
        True, label="May write before it draws", info="As a model does whose edits came with captions."
    )
    controls = Controls("Edit")
    again = gr.Button("Edit the result", size="sm")

    async def edit(
        path: str | None, text: str, writes: bool, entries: list, *values: Any
    ) -> AsyncIterator[Update]:
        """Draw an image anew as an instruction tells."""
        options = page.settings.read(values)
        source = await page.load(path)
        if not text.strip():
            raise UserError("Instruction is empty: write what to change")
        name = file_name(text, options.seed)
        yield {page.settings.seed: options.seed}
        async for (answer,) in page.answers([[source, text]], options, "free" if writes else "image"):
            yield {edited: turn(answer, name), controls.status: progress([answer])}
        if not answer.images:
            raise UserError(
                "The model ended without an image: it may not be trained on edits. "
                f"Untick '{may_write.label}' to have it draw at once"
            )
        entries = page.gallery.add(entries, answer.images[0], name, f"{text} seed {options.seed}")
        yield page.gallery.show(entries) | controls.idle("Done.")

    controls.wire(
        edit,
        [image, instruction, may_write, page.gallery.entries, *page.settings.inputs],
        [edited, page.settings.seed, *page.gallery.outputs],
        "edit",
        also=[instruction.submit],
    )
    again.click(page.gallery.newest, page.gallery.entries, image, api_visibility="private")
    return image
