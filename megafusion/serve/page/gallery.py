"""The images that a session made: files for a while, shown, downloaded, and taken up by other tabs."""

import secrets
import zipfile
from collections import deque
from pathlib import Path
from shutil import rmtree
from typing import Any

import gradio as gr
from PIL import Image

from megafusion.images.grid import encode_png

MAX_SHOWN, MAX_KEPT = 200, 2000
"""Images that a session shows, and that the server keeps for all sessions: the newest."""
CLICK = "() => setTimeout(() => document.querySelector('#zip a, a#zip, button#zip').click(), 300)"

Entry = tuple[str, str]
"""A file, and its caption."""


class Gallery:
    """entries: of a session, the newest first. folder: of the files; removed at the server's end."""

    def __init__(self, folder: Path):
        self.folder, self.kept = folder, deque[Path]()
        self.entries, self.selected = gr.State([]), gr.State(0)
        self.view = gr.Gallery(
            columns=6,
            height=520,
            object_fit="contain",
            show_label=False,
            interactive=False,
            buttons=["download", "fullscreen"],
            elem_id="gallery",
            render=False,
        )
        self.outputs = [self.entries, self.view]

    def add(self, entries: list[Entry], image: Image.Image, name: str, caption: str) -> list[Entry]:
        """A session's entries with an image more, which is written to a file of this name."""
        folder = self._new_folder()
        (folder / name).write_bytes(encode_png(image))
        return [(str(folder / name), caption), *entries][:MAX_SHOWN]

    def show(self, entries: list[Entry]) -> dict[Any, Any]:
        """The gallery with its images, as components with their values."""
        kept = _present(entries)
        return {self.entries: kept, self.view: kept}

    def newest(self, entries: list[Entry]) -> Any:
        """The file of the newest image; leaves a component as it is if there is none."""
        return kept[0][0] if (kept := _present(entries)) else gr.skip()

    def tab(self, tabs: gr.Tabs, describe: gr.Image, edit: gr.Image) -> None:
        """Lay the tab out in the layout that is open. describe, edit: images of other tabs."""
        self.view.render()
        with gr.Row():
            buttons = [gr.Button("Describe it", size="md"), gr.Button("Edit it", size="md")]
            zipped = gr.Button("Download all", size="md")
        file = gr.DownloadButton(elem_id="zip", visible="hidden")
        self.view.select(_index, None, self.selected, api_visibility="private")
        for button, image, tab in zip(buttons, (describe, edit), ("describe", "edit"), strict=True):

            def take(entries: list[Entry], index: int, tab: str = tab) -> Any:
                kept = _present(entries)
                if not kept:
                    gr.Info("Nothing is drawn yet.")
                    return gr.skip(), gr.skip()
                return kept[min(index, len(kept) - 1)][0], gr.Tabs(selected=tab)

            button.click(take, [self.entries, self.selected], [image, tabs], api_visibility="private")
        zipped.click(self._zip, self.entries, file, api_visibility="private").success(None, js=CLICK)

    def _zip(self, entries: list[Entry]) -> str:
        kept = _present(entries)
        if not kept:
            raise gr.Error("Nothing is drawn yet.", print_exception=False)
        path = self._new_folder() / "megafusion.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for number, (name, _) in enumerate(reversed(kept)):
                archive.write(name, f"{number:03d}-{Path(name).name}")
        return str(path)

    def _new_folder(self) -> Path:
        folder = self.folder / secrets.token_hex(8)
        folder.mkdir()
        self.kept.append(folder)
        while len(self.kept) > MAX_KEPT:
            rmtree(self.kept.popleft())
        return folder


def _index(event: gr.SelectData) -> int:
    return event.index


def _present(entries: list[Entry]) -> list[Entry]:
    """Those whose files the server still keeps."""
    return [entry for entry in entries if Path(entry[0]).is_file()]
