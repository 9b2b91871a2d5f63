"""The page of a model that makes videos: a form, what was made, and two of them side by side."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from threading import Event
from typing import Any, Literal, get_args

from mm_convert.cli.arguments import options_of
from mm_convert.cli.values import kinds_of, read_text
from mm_infer.config import Options
from mm_infer.loras import read_loras
from mm_infer.page.markup import CARDS, cards, differences, film, short, status
from mm_infer.page.studio import Made, Stopped, Studio
from mm_models.diffusion.samplers import fitting
from mm_models.distilled import describe_distilled

PICTURES = ("image", "last_image")
LABELS = {
    "image": "Image",
    "last_image": "Last image",
    "video": "Video",
    "mask": "Mask (image or video): white changes",
    "references": "References (images)",
    "fps": "FPS",
    "flow_shift": "Shift",
}
SHOWN = (
    ("height", "width", "frames", "fps"),
    ("steps", "guidance", "flow_shift", "sampler"),
    ("seed", "strength", "control_scale"),
)
"""Rows of the form; all other options stand below, closed."""
FOLLOWING = {"height": {"image", "video"}, "width": {"image", "video"}, "frames": {"video"}}
"""Options that follow what the video is made from, where they are left open."""


def build(gradio: Any, studio: Studio) -> Any:
    """The blocks of the page."""
    return _Page(gradio, studio).blocks


class _Page:
    def __init__(self, gradio: Any, studio: Studio) -> None:
        self.gr, self.studio = gradio, studio
        self.ended: dict[str, Event] = {}
        """By session, what its video looks at between two steps."""
        self.hints = {option.name: option for option in options_of(Options)}
        self.tasks = {task.name: task for task in studio.tasks}
        with gradio.Blocks(title="mm_infer", analytics_enabled=False, fill_width=True) as self.blocks:
            gradio.Markdown(self._headline())
            with gradio.Tabs() as self.tabs:
                with gradio.Tab("Make", id="make"):
                    self._form()
                with gradio.Tab("Made", id="made") as made:
                    self._gallery()
                with gradio.Tab("Compare", id="compare") as compare:
                    self._compare()
            self._connect(made, compare)

    # What is seen

    def _headline(self) -> str:
        studio, config = self.studio, self.studio.config
        parts = [studio.facts.family.name, str(studio.sampler.device), str(studio.sampler.dtype).removeprefix("torch.")]
        lines = [f"### {escape(config.weights.resolve().name)}", f"{', '.join(parts)} · videos go to `{config.output}`"]
        if loras := read_loras(config.lora, config.lora_strength, config.lora_alpha):
            lines.append(f"with {', '.join(f'`{lora.path}`' for lora in loras)}")
        if known := studio.facts.distilled:
            lines.append(escape(describe_distilled(known, vars(config.options))))
        return "\n".join(line + "  " for line in lines)

    def _form(self) -> None:
        gr, config = self.gr, self.studio.config
        first = config.task if config.task in self.tasks else next(iter(self.tasks))
        with gr.Row():
            with gr.Column(scale=3):
                choices = [(str(task), name) for name, task in self.tasks.items()]
                self.task = gr.Radio(choices, value=first, label="Task (made from)", visible=len(choices) > 1)
                self.prompt = gr.Textbox(
                    config.prompt or "", label="Prompt", lines=3, placeholder="What to show", elem_id="prompt"
                )
                usual = self.studio.usual("negative_prompt")
                self.options = {"negative_prompt": gr.Textbox(usual, label="Negative prompt: what to avoid", lines=2)}
                with gr.Row():
                    self.inputs = {name: self._input(name, first) for name in self._all_inputs()}
                names = [name for name in self.studio.options if name not in ("task", "negative_prompt")]
                for row in SHOWN:
                    with gr.Row():
                        for name in row:
                            if name in names:
                                self._option(name, first)
                more = [name for name in names if not any(name in row for row in SHOWN)]
                with gr.Accordion("More settings", open=False, visible=bool(more)):
                    for name in more:
                        self._option(name, first)
            with gr.Column(scale=4):
                with gr.Row():
                    self.go = gr.Button("Make the video", variant="primary", scale=3, elem_id="go")
                    self.stop = gr.Button("Stop", variant="stop", scale=1, elem_id="stop")
                self.status = gr.HTML(status("Nothing is made yet."), elem_id="status", min_height=70)
                self.result = self._one("result")

    def _one(self, id: str) -> dict[str, Any]:
        """Where one video is shown."""
        gr = self.gr
        parts = {"video": gr.HTML("", elem_id=f"{id}-video", elem_classes="mm-video")}
        parts["command"] = gr.Textbox(
            "",
            label="The same as a command",
            info=f"Run it in {Path.cwd()}. It makes the same video, bit for bit.",
            lines=3,
            max_lines=12,
            interactive=False,
            buttons=["copy"],
            elem_id=f"{id}-command",
            elem_classes="mm-command",
            visible=False,
        )
        with gr.Accordion("All settings", open=False, visible=False) as parts["folded"]:
            parts["settings"] = gr.JSON(None, show_label=False, elem_id=f"{id}-settings")
        return parts

    def _all_inputs(self) -> list[str]:
        known = ("image", "last_image", "video", "mask", "references")
        return [name for name in known if any(name in task.inputs for task in self.tasks.values())]

    def _input(self, name: str, task: str) -> Any:
        gr, how = self.gr, {"visible": name in self.tasks[task].inputs, "elem_id": f"input-{name}", "min_width": 200}
        label = LABELS[name]
        if name in PICTURES:
            picture = gr.Image(label=label, sources=["upload"], height=220, **how)
            picture.preprocess = lambda payload: payload and payload.path  # as it is: the library says what is wrong
            return picture
        if name == "video":
            return gr.Video(label=label, sources=["upload"], height=220, **how)
        several = name == "references"
        kinds = ["image"] if several else ["image", "video"]
        count = "multiple" if several else "single"
        return gr.File(label=label, file_types=kinds, file_count=count, type="filepath", height=220, **how)

    def _option(self, name: str, task: str) -> None:
        """A component for an option, by its type."""
        gr, option = self.gr, self.hints[name]
        label = LABELS.get(name, name.replace("_", " ").capitalize())
        own = any(name in one.options for one in self.tasks.values())
        how = {"label": label, "elem_id": f"option-{name}", "visible": not own or name in self.tasks[task].options}
        value = self.studio.usual(name)
        if own and value is None:
            value = next(one.options[name] for one in self.tasks.values() if name in one.options)
        kinds = [kind.hint for kind in kinds_of(option.hint)]
        if name == "sampler":
            self.options[name] = gr.Dropdown(list(fitting(self.studio.facts.prediction)), value=value, **how)
        elif choices := [choice for kind in kinds if _is_literal(kind) for choice in get_args(kind)]:
            self.options[name] = gr.Dropdown([("as usual", ""), *choices], value=value or "", info=option.help, **how)
        elif bool in kinds:
            self.options[name] = gr.Checkbox(bool(value), info=option.help, **how)
        else:
            help = None if any(name in row for row in SHOWN) else option.help
            first = {"value": _typed(value), "placeholder": "as usual"} if own else self._first_value(name, task)
            self.options[name] = gr.Textbox(info=help, max_lines=1, min_width=100, **first, **how)

    def _gallery(self) -> None:
        gr = self.gr
        self.cards = gr.HTML("", js_on_load=CARDS, elem_id="cards", show_label=False)
        self.chosen = gr.State(None)
        with gr.Row():
            with gr.Column(scale=3):
                self.shown = self._one("shown")
            with gr.Column(scale=1, min_width=160):
                self.reuse = gr.Button("Use these settings", visible=False, elem_id="reuse")
                self.put = [gr.Button(f"Compare as {side}", visible=False, elem_id=f"put-{side}") for side in "AB"]

    def _compare(self) -> None:
        gr = self.gr
        with gr.Row():
            self.sides, self.films = [], []
            for side in "AB":
                with gr.Column():
                    self.sides.append(gr.Dropdown([], label=f"Video {side}", elem_id=f"side-{side}"))
                    self.films.append(gr.HTML("", elem_id=f"film-{side}", elem_classes="mm-video"))
        self.differing = gr.HTML("", elem_id="difference")

    # What happens

    def _connect(self, made: Any, compare: Any) -> None:
        gr, private = self.gr, {"api_visibility": "private"}
        at_once = {"queue": False, "show_progress": "hidden", **private}
        listed = [self.cards, *self.sides]
        changing = [*self.inputs.values(), *self.options.values()]
        self.task.input(self._for_task, self.task, changing, **at_once)

        result = list(self.result.values())
        given = [self.task, self.prompt, *self.inputs.values(), *self.options.values()]
        making = self.go.click(_with_session(gr, self._begin), None, self.status, **at_once)
        making = making.then(
            _with_progress(gr, self._make),
            given,
            [self.status, *result],
            show_progress="full",
            show_progress_on=self.status,
            concurrency_limit=1,
            concurrency_id="model",
            **private,
        )
        making.then(self._list, self.sides, listed, **at_once)
        self.stop.click(_with_session(gr, self._stop), None, None, **at_once)

        self.blocks.load(self._list, self.sides, listed, **at_once)
        made.select(self._list, self.sides, listed, **at_once)
        compare.select(self._list, self.sides, listed, **at_once)
        buttons = [self.reuse, *self.put]
        self.cards.click(_of_event(gr, self._show), None, [self.chosen, *self.shown.values(), *buttons], **at_once)
        self.reuse.click(self._reuse, self.chosen, [self.tabs, self.task, self.prompt, *changing], **at_once)
        for button, side in zip(self.put, self.sides, strict=True):
            button.click(lambda name: (name, gr.Tabs(selected="compare")), self.chosen, [side, self.tabs], **at_once)
        for side in self.sides:
            side.change(self._beside, self.sides, [*self.films, self.differing], **at_once)

    def _for_task(self, task: str) -> list[Any]:
        gr, chosen = self.gr, self.tasks[task]
        shown: list[Any] = [gr.update(visible=name in chosen.inputs) for name in self.inputs]
        of_tasks = {name for one in self.tasks.values() for name in one.options}
        for name in self.options:
            if name in of_tasks:
                shown.append(gr.update(visible=name in chosen.options))
            elif name in ("height", "width"):  # a picture has its own shape
                free = not {"image", "video"} & chosen.inputs
                shown.append(
                    gr.update(value=_typed(self.studio.usual(name)) if free else "", placeholder="as the input")
                )
            else:
                shown.append(gr.update())
        return shown

    def _first_value(self, name: str, task: str) -> dict[str, str]:
        """What the form holds of an option: nothing, where what is given decides."""
        value = _typed(self.studio.usual(name))
        decides = FOLLOWING.get(name, set()) & self.tasks[task].inputs
        if decides and getattr(self.studio.config, name) is None:
            return {"value": "", "placeholder": "as given"}
        return {"value": value, "placeholder": "as usual"}

    def _begin(self, session: str) -> str:
        self.ended[session] = Event()
        return status("")

    def _stop(self, session: str) -> None:
        if session in self.ended:
            self.ended[session].set()

    def _make(self, given: tuple[Any, ...], session: str, show: Any) -> list[Any]:
        task, prompt, *rest = given
        inputs = dict(zip(self.inputs, rest, strict=False))
        options = dict(zip(self.options, rest[len(inputs) :], strict=True))
        ended = self.ended.setdefault(session, Event())
        kept = [self.gr.update()] * len(self.result)

        def tell(done: Any, what: str) -> None:
            show(done, desc=what, unit="steps")

        try:
            made = self.studio.make(self._values(task, prompt, inputs, options), tell, ended.is_set)
        except Stopped:
            return [status("Stopped."), *kept]
        except (ValueError, OSError, FloatingPointError, MemoryError) as error:
            return [status(str(error), error=True), *kept]
        return [status(f"Made {made.name}."), *self._parts(made)]

    def _values(self, task: str, prompt: str, inputs: Mapping[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        """The fields of a `Config` that the form says."""
        if not prompt.strip():
            raise ValueError("the prompt is empty: say what to show")
        chosen = self.tasks[task]
        of_others = {name for one in self.tasks.values() for name in one.options} - chosen.options.keys()
        values = {name: self._read(name, value) for name, value in options.items() if name not in of_others}
        values |= {name: value for name, value in inputs.items() if name in chosen.inputs and value}
        paths = {name: _paths(value) for name, value in values.items() if name in inputs}
        return values | paths | {"task": task, "prompt": prompt}

    def _read(self, name: str, value: Any) -> Any:
        """What was typed or chosen, as the flag of this name reads it; None where nothing was."""
        hint = self.hints[name].hint
        if not isinstance(value, str) or any(kind.hint is str for kind in kinds_of(hint)):
            return value
        return read_text(name, value.strip(), hint) if value.strip() else None

    def _list(self, one: str | None, other: str | None) -> list[Any]:
        """The cards, and the choices of both sides."""
        gr, made = self.gr, self.studio.made()
        choices = [(f"{each.name}: {short(each.record.get('prompt'))}", each.name) for each in made]
        names = [each.name for each in made]
        usual = [*names[1:2], *names[:1]] if len(names) > 1 else [*names, None]
        sides = [
            side if side in names else fallback for side, fallback in zip((one, other), [*usual, None], strict=False)
        ]
        return [cards(made), *(gr.update(choices=choices, value=side) for side in sides)]

    def _show(self, name: str) -> list[Any]:
        gr = self.gr
        made = self._find(name)
        if made is None:
            return [None, *[gr.update()] * (len(self.shown) + 1 + len(self.put))]
        return [name, *self._parts(made), *[gr.update(visible=True)] * (1 + len(self.put))]

    def _parts(self, made: Made) -> list[Any]:
        gr = self.gr
        try:
            line = self.studio.command(made)
        except ValueError as error:
            line = f"# {error}"
        return [
            film(made),
            gr.update(value=line, visible=True),
            gr.update(visible=True),
            dict(made.record),
        ]

    def _find(self, name: str | None) -> Made | None:
        return next((made for made in self.studio.made() if made.name == name), None)

    def _reuse(self, name: str | None) -> list[Any]:
        """The settings of a video, in the form."""
        gr, made = self.gr, self._find(name)
        if made is None or made.record.get("task") not in self.tasks:
            return [gr.update()] * (3 + len(self.inputs) + len(self.options))
        record = made.record
        values: list[Any] = []
        for each in self.inputs:
            named = record.get(each)
            paths = [self.studio.lend(one) for one in named] if isinstance(named, list) else self.studio.lend(named)
            values.append(gr.update(value=paths or None, visible=each in self.tasks[record["task"]].inputs))
        of_tasks = {each for one in self.tasks.values() for each in one.options}
        for each, component in self.options.items():
            shown = {"visible": each in self.tasks[record["task"]].options} if each in of_tasks else {}
            value = record.get(each)
            values.append(gr.update(value=_typed(value) if isinstance(component, gr.Textbox) else value, **shown))
        return [gr.Tabs(selected="make"), record["task"], record.get("prompt", ""), *values]

    def _beside(self, one: str | None, other: str | None) -> list[str]:
        pair = [self._find(one), self._find(other)]
        films = ["" if made is None else film(made) for made in pair]
        if None in pair:
            return [*films, ""]
        return [*films, differences(*pair)]


def _typed(value: Any) -> str:
    """As it is typed into the form: `5`, `[4, 3]`."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_typed, value))}]"
    return "" if value is None else str(value)


def _is_literal(hint: Any) -> bool:
    return getattr(hint, "__origin__", None) is Literal


def _paths(value: Any) -> Any:
    return [Path(one) for one in value] if isinstance(value, list) else Path(value)


def _with_progress(gr: Any, make: Any) -> Any:
    def run(request: Any, progress: Any = gr.Progress(), *given: Any) -> Any:  # noqa: B008 - so gradio is asked for it
        return make(given, request.session_hash, progress)

    run.__annotations__ = {"request": gr.Request}
    return run


def _with_session(gr: Any, call: Any) -> Any:
    def run(request: Any) -> Any:
        return call(request.session_hash)

    run.__annotations__ = {"request": gr.Request}
    return run


def _of_event(gr: Any, show: Any) -> Any:
    def run(event: Any) -> Any:
        return show(str(event._data.get("name")))

    run.__annotations__ = {"event": gr.EventData}
    return run
