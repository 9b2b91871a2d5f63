"""The page of a model that answers: a conversation with images and videos."""

from __future__ import annotations

from dataclasses import replace
from html import escape
from threading import Lock
from typing import Any

from mm_data import is_picture
from mm_data.conversations import Media, Turn, Unusable
from mm_infer.chat import Asking, Config, load, look_at, open_model

CSS = """
.mm-error {color: var(--error-text-color, #b91c1c)}
#chat button[title='Share'], #chat button[aria-label='Share'] {display: none}
"""


class Talker:
    """A model that answers one question at a time."""

    def __init__(self, config: Config) -> None:
        """ValueError for weights that answer nothing, or are not whole."""
        self.config = config
        self.answerer = load(config, open_model(config))
        self._one = Lock()

    def __call__(
        self, turns: tuple[Turn, ...], text: str, files: list[str], **how: Any
    ) -> tuple[str, tuple[Turn, ...]]:
        """The answer, and the conversation with it. how: fields of `mm_infer.chat.Config`.

        Raises ValueError for an empty question or a wrong option, Unusable for a file that cannot be read.
        """
        ask = Asking(replace(self.config, **how), self.answerer)
        media = [look_at(Media("image" if is_picture(file) else "video", file)) for file in files]
        if not text.strip():
            raise ValueError("the question is empty: write one")
        with self._one:
            return ask.go_on(turns, (*media, text))


def build(gradio: Any, talker: Talker) -> Any:
    """The blocks of the page."""
    gr, config = gradio, talker.config

    def take(message: dict[str, Any], shown: list[Any]) -> tuple[Any, ...]:
        """The question goes into the conversation at once, so that the next one can be written meanwhile."""
        asked = [{"role": "user", "content": {"path": file}} for file in message["files"]]
        asked += [{"role": "user", "content": message["text"]}] if message["text"] else []
        return None, [*shown, *asked], (message, len(asked)), ""

    def answer(taken: tuple[dict[str, Any], int], shown: list[Any], turns: tuple[Turn, ...], *how: Any) -> list[Any]:
        message, asked = taken
        names = ("max_new_tokens", "temperature", "seed", "boxes")
        try:
            said, after = talker(turns, message["text"], message["files"], **dict(zip(names, how, strict=True)))
        except (ValueError, OSError, MemoryError, Unusable) as error:  # the question goes back to where it was written
            told = f'<div class="mm-error" role="alert">{escape(str(error))}</div>'
            return [message, shown[: len(shown) - asked], turns, told]
        return [gr.update(), [*shown, {"role": "assistant", "content": said or "(an empty answer)"}], after, ""]

    with gr.Blocks(title="mm_infer", analytics_enabled=False, fill_height=True) as blocks:
        gr.Markdown(f"### {escape(config.weights.resolve().name)}\n{escape(str(talker.answerer.device))}")
        turns, taken = gr.State(()), gr.State(None)
        chatbot = gr.Chatbot(
            label="Conversation",
            render_markdown=False,
            height="60vh",
            buttons=["copy"],
            elem_id="chat",
            feedback_options=None,
        )
        error = gr.HTML("", elem_id="error")
        message = gr.MultimodalTextbox(
            file_types=["image", "video"],
            file_count="multiple",
            placeholder="Ask; the clip adds images and videos",
            show_label=False,
            elem_id="question",
        )
        with gr.Row():
            most = gr.Number(config.max_new_tokens, label="Most tokens of an answer", precision=0, min_width=120)
            temperature = gr.Number(config.temperature, label="Temperature (0: the likeliest)", step=0.1, min_width=120)
            seed = gr.Number(config.seed, label="Seed", precision=0, min_width=120)
            boxes = gr.Dropdown(["model", "original"], value=config.boxes, label="Boxes in pixels of", min_width=120)
            new = gr.Button("New conversation", elem_id="new")
        private = {"api_visibility": "private"}
        at_once = {"queue": False, "show_progress": "hidden", **private}
        how = [taken, chatbot, turns, most, temperature, seed, boxes]
        one = {"concurrency_limit": 1, "concurrency_id": "model", **private}
        asking = message.submit(take, [message, chatbot], [message, chatbot, taken, error], **at_once)
        asking.then(answer, how, [message, chatbot, turns, error], show_progress_on=chatbot, **one)
        chatbot.clear(lambda: ((), ""), None, [turns, error], queue=False, **private)
        new.click(lambda: (None, [], (), ""), None, [message, chatbot, turns, error], queue=False, **private)
    return blocks
