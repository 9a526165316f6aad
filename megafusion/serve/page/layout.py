"""The page as a whole."""

from collections.abc import Sequence
from pathlib import Path

import gradio as gr

from megafusion.images.sizes import format_sizes
from megafusion.serve.page.chat import chat_tab
from megafusion.serve.page.describe import describe_tab
from megafusion.serve.page.draw import draw_tab
from megafusion.serve.page.edit import edit_tab
from megafusion.serve.page.gallery import Gallery
from megafusion.serve.page.parts import Page
from megafusion.serve.page.render import header
from megafusion.serve.page.settings import Settings
from megafusion.serve.worker import Worker

DELETE_EVERY, MAX_AGE = 600, 4 * 3600
"""Seconds between two deletions of files that were uploaded or shown, and their age."""

CLOSE_SIDEBAR = """() => {
    if (innerWidth < 768) document.querySelector('.sidebar button.toggle-button')?.click()
}"""
"""On a narrow screen, where it would cover the page."""


def make_page(worker: Worker, name: str, captions: Sequence[str], folder: Path) -> gr.Blocks:
    """The page of a worker's pipeline. name: of the model. captions: examples. folder: of drawn images."""
    pipeline = worker.pipeline
    about = f"{name} · {format_sizes(pipeline.sizes)} pixels · {pipeline.device}"
    with gr.Blocks(
        title="MegaFusion", analytics_enabled=False, delete_cache=(DELETE_EVERY, MAX_AGE), fill_width=True
    ) as blocks:
        with gr.Sidebar(width=300):
            settings = Settings(worker)
        gr.HTML(header(about))
        gallery = Gallery(folder)
        with gr.Tabs() as tabs:  # holds tabs alone: gradio takes them by their number
            page = Page(worker, settings, gallery, tabs, captions, folder.parent)
            with gr.Tab("Draw", id="draw"):
                prompt = draw_tab(page)
            with gr.Tab("Describe", id="describe"):
                described = describe_tab(page, prompt)
            with gr.Tab("Edit", id="edit"):
                edited = edit_tab(page)
            with gr.Tab("Chat", id="chat"):
                chat_tab(page)
            with gr.Tab("Gallery", id="gallery"):
                gallery.tab(tabs, described, edited)
        blocks.load(None, js=CLOSE_SIDEBAR)
    return blocks
