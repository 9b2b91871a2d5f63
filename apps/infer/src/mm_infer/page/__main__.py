"""python -m mm_infer.page --weights W [--output out/]"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from mm_convert import open_checkpoint, open_experts
from mm_convert.cli.arguments import Option, instantiate, nearest, options_of, parse_options
from mm_convert.cli.terminal import escaped_output
from mm_convert.cli.values import check_value
from mm_infer import chat
from mm_infer.checks import check_output
from mm_infer.config import Config
from mm_infer.weights import must_exist
from mm_models.families import family_of_weights

SAID_ON_IT = {"image", "last_image", "video", "mask", "references", "questions", "media"}
OF_A_COMMAND = {"deadline", "overwrite", "check"}


@dataclass(frozen=True)
class Serving:
    """A page in the browser, on which videos are made; of a conversation model, questions are answered."""

    host: str = "127.0.0.1"
    "address to listen at: 127.0.0.1 is this machine alone, 0.0.0.0 everybody"
    port: Annotated[int, ">= 0", "<= 65535"] = 7860
    "0: any free one"
    output: Path = Path("out")
    "folder of the videos; those that are there are shown, too"


@escaped_output()
def main(argv: Sequence[str] | None = None) -> None:
    """Exit code 2 for a command that cannot work; 130 after Ctrl-C."""
    try:
        with ExitStack() as held, chat.exit_code("mm_infer.page", 2, ValueError, OSError):
            app, listening = prepare(argv, held)
            from mm_infer.page.serve import serve

            serve(app, listening)
    except KeyboardInterrupt:
        sys.exit(130)


def prepare(argv: Sequence[str] | None, held: ExitStack) -> tuple[Any, Any]:
    """The application, and the socket that it is to listen at. `held`: left when it ends.

    ValueError or OSError for what cannot work, with the way out.
    """
    from mm_infer.page.serve import claim_port, import_gradio, make_app

    given = read_flags(argv)
    family = _family(given["weights"])
    if family.chat is not None:
        what = f"weights of {family.name} answer questions"
        config = _configure(chat.Config, given, what)
        if trained := chat.trained_options(config.lora, config.weights):
            config = _configure(chat.Config, read_flags(argv, trained), what)
    else:
        config = _configure(Config, given, f"weights of {family.name} make videos", prompt=given["prompt"] or "")
        check_output(config.output)
    listening = held.enter_context(claim_port(given["host"], given["port"]))
    gradio, uploads = import_gradio(held)
    if family.chat is not None:
        from mm_infer.page import talk

        blocks, css, find = talk.build(gradio, talk.Talker(config)), talk.CSS, lambda name: None
    else:
        from mm_infer.checks import open_weights
        from mm_infer.page import markup, videos
        from mm_infer.page.studio import Studio

        studio = Studio(config, open_weights(config), uploads, held)
        blocks, css, find = videos.build(gradio, studio), markup.CSS, studio.find
    return make_app(gradio, blocks, css, given["host"], find), listening


def read_flags(argv: Sequence[str] | None, defaults: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """The flags by name."""
    say = inspect.getdoc(Serving) or ""
    return parse_options(_options(), dict, argv, prog="mm_infer.page", description=say, defaults=defaults)


def _options() -> list[Option]:
    """What a page can be told: how to serve, which model, and what the form holds at first."""
    known = {option.name: option for option in options_of(Serving)}
    for option in (*options_of(Config), *options_of(chat.Config)):
        name = option.name
        asked = name in SAID_ON_IT | OF_A_COMMAND or name.endswith("_file") or name.startswith("parallel.")
        if not asked:
            known.setdefault(name, option)
    return list(known.values())


def _family(path: Path) -> Any:
    pair = open_experts(must_exist(path, "weights"))
    return family_of_weights(open_checkpoint(pair.high if pair else path).family)


def _configure(kind: type, given: Mapping[str, Any], what: str, **more: Any) -> Any:
    """The configuration of this kind. ValueError for a flag of the other one."""
    own = {option.name: option for option in options_of(kind)}
    usual = {option.name: option.default for option in _options()}
    for name, value in given.items():
        if name not in own and not hasattr(Serving, name) and value != usual[name]:
            raise ValueError(f"{what}, and --{name} is of others: leave it out{nearest(name, own)}")
    values = {
        name: check_value(name, given[name], option.hint) if name in given else option.default
        for name, option in own.items()
    }
    return instantiate(kind, values | more)


if __name__ == "__main__":
    main()
