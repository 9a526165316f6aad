"""The tab in which texts and images come in any order, from both sides."""

from collections.abc import AsyncGenerator, Sequence
from typing import Any, Literal

import gradio as gr

from megafusion.generate.row import Part
from megafusion.serve.content import Content
from megafusion.serve.errors import Refusal
from megafusion.serve.page.parts import Controls, Page, Update, file_name, progress
from megafusion.serve.page.render import message, turn

Turn = tuple[Literal["user", "assistant"], list[Part]]

MAX_TURNS = 100
"""Of a conversation; older ones are forgotten."""
WELCOME = """Write a text, attach images, or both.

"Add" takes a part without an answer to it, so that texts and images can come in any order."""


def chat_tab(page: Page) -> None:
    """Lay the tab out in the layout that is open."""
    turns = gr.State([])
    view = gr.Chatbot(
        show_label=False,
        height=440,
        latex_delimiters=[],
        buttons=[],
        feedback_options=None,
        placeholder=WELCOME,
        elem_id="chat",
    )
    box = gr.MultimodalTextbox(
        show_label=False,
        placeholder="red apple, 3d style",
        file_types=["image"],
        file_count="multiple",
        submit_btn=False,
        elem_id="box",
    )
    controls = Controls("Send")
    with gr.Row():
        sees_all = gr.Checkbox(
            False,
            label="The model sees the whole conversation",
            info="Otherwise what came after its last answer, which models need that were trained on pairs.",
            scale=4,
        )
        add = gr.Button("Add without an answer", size="sm", min_width=120)
        clear = gr.Button("Clear", size="sm", min_width=80)

    async def taken(given: dict[str, Any], before: list[Turn], content: Content) -> list[Turn]:
        """The turns with a message more; its images come before its text."""
        parts: list[Part] = [await page.load(file, content) for file in given["files"]]
        if given["text"].strip():
            parts.append(content.text(given["text"], "Message"))
        return [*before[-MAX_TURNS:], ("user", parts)] if parts else before

    async def send(
        given: dict[str, Any], before: list[Turn], whole: bool, entries: list, *values: Any
    ) -> AsyncGenerator[Update]:
        """Add a message to the conversation, and answer it."""
        options = page.settings.read(values)
        content = page.content()
        content.count(_document(before, whole), "The conversation")
        now = await taken(given, before, content)
        if not now or now[-1][0] == "assistant":
            raise Refusal(400, "Message is empty: write a text, attach an image, or both")
        document, shown = _document(now, whole), _messages(now)
        texts = [part for part in document if isinstance(part, str)]
        name = file_name(texts[-1] if texts else "answer", options.seed)
        update: Update = {page.settings.seed: options.seed, box: None}
        async for (answer,) in page.answers([document], options, "free"):
            update |= {
                turns: [*now, ("assistant", list(answer.parts))],
                view: [*shown, {"role": "assistant", "content": turn(answer, name)}],
                controls.status: progress([answer]),
            }
            yield update
            update = {}  # the box may hold the next message by now
        for image in answer.images:
            entries = page.gallery.add(entries, image, name, f"{' '.join(texts)} seed {options.seed}")
        yield page.gallery.show(entries)
        if not answer.parts:
            raise Refusal(422, "The model ended at once, without an answer")

    async def add_only(given: dict[str, Any], before: list[Turn]) -> Update:
        try:
            now = await taken(given, before, page.content())
        except Refusal as error:
            return controls.idle(str(error), is_error=True)
        return {turns: now, view: _messages(now), box: None} | controls.idle("")

    controls.wire(
        send,
        [box, turns, sees_all, page.gallery.entries, *page.settings.inputs],
        [box, turns, view, page.settings.seed, *page.gallery.outputs],
        "chat",
        also=[box.submit],
    )
    add.click(
        add_only,
        [box, turns],
        [box, turns, view, *controls.outputs],
        preprocess=False,
        api_visibility="private",
    )
    gr.on([clear.click, view.clear], lambda: ([], []), None, [turns, view], api_visibility="private")


def _document(turns: Sequence[Turn], sees_all: bool) -> list[Part]:
    """The parts that the model sees: of all turns, or of those after its last answer."""
    answers = [index for index, (role, _) in enumerate(turns) if role == "assistant"]
    first = 0 if sees_all or not answers else answers[-1] + 1
    return [part for _, parts in turns[first:] for part in parts]


def _messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    return [{"role": role, "content": message(parts)} for role, parts in turns]
