"""The samplers by name, and what is settled of sampling before a model is loaded: for mm_infer and mm_train alike.

This file imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple

from mm_models.family import Published

SamplerName = Literal["unipc", "euler", "euler_ancestral", "pndm", "ddim", "ddpm"]
Grid = Literal["guides", "diffusers"]


class Sampler(NamedTuple):
    """What one needs and does."""

    flow: bool
    """Whether it steps along a flow, or else removes noise that the model predicts."""
    least_steps: int
    """With fewer, none would be at high noise, or it could not begin."""
    draws: bool = False
    """Whether it draws noise at every step."""
    more_calls: int = 0
    """Calls of the model beyond one a step."""


SAMPLERS: Mapping[str, Sampler] = {
    "unipc": Sampler(True, 1),
    "euler": Sampler(True, 1),
    "euler_ancestral": Sampler(False, 2, draws=True),
    "pndm": Sampler(False, 4, more_calls=9),  # the first three are Runge-Kutta steps, of four calls each
    "ddim": Sampler(False, 2),
    "ddpm": Sampler(False, 2, draws=True),
}
FLOW_OPTIONS = {
    "flow_shift": "moves the steps of flow matching towards noise",
    "grid": "chooses the noise levels of flow matching",
}


def fitting(prediction: str) -> tuple[str, ...]:
    """The samplers for models that predict this: "flow", "epsilon" or "v_prediction"."""
    return tuple(name for name, sampler in SAMPLERS.items() if sampler.flow == (prediction == "flow"))


def count_calls(sampler: str, steps: int, start: int = 0) -> int:
    """How many steps `denoise` makes and reports, each one call of the model (or two, with guidance): `steps` without
    those before `start`, and what the sampler makes more."""
    return steps - start + SAMPLERS[sampler].more_calls


def check_sampling(asked: Mapping[str, Any], published: Published, prediction: str, flag: str = "") -> None:
    """ValueError for settings that such a model has not, or that do not go together. `asked` and `flag`: see
    `settle_sampling`."""
    sampler, steps = asked.get("sampler") or published.sampler, asked.get("steps") or published.steps
    check_sampler(sampler, prediction, flag)
    check_flow_options(asked, prediction, flag)
    check_steps(sampler, steps, flag)
    template = asked.get("prompt_template")
    if template is not None and template.count("{}") != 1:
        raise ValueError(
            f"{flag}prompt_template {template!r}: the prompt is put where {{}} stands, so this must be there exactly "
            "once; '{}' alone leaves the prompt as it is"
        )


def check_sampler(name: str, prediction: str, flag: str = "") -> None:
    """ValueError for a sampler that is not known, or not for such models."""
    able = fitting(prediction)
    if name in able:
        return
    near = get_close_matches(name, able, n=1, cutoff=0.5)
    hint = f", did you mean {near[0]}?" if near else ""
    why = f"does not fit a model that predicts {prediction}" if name in SAMPLERS else "is not known"
    raise ValueError(f"{flag}sampler {name!r} {why}; there are {', '.join(able)}{hint}")


def check_flow_options(asked: Mapping[str, Any], prediction: str, flag: str = "") -> None:
    """ValueError for options of flow matching where a model does not predict a flow."""
    for name, does in FLOW_OPTIONS.items():
        if asked.get(name) is not None and prediction != "flow":
            raise ValueError(
                f"{flag}{name} {asked[name]}: it {does}, but this model predicts {prediction}: leave it out"
            )


def check_steps(sampler: str, steps: int, flag: str = "") -> None:
    """ValueError for fewer steps than a sampler can make a video in."""
    least = SAMPLERS[sampler].least_steps
    if steps < least:
        why = "" if least == 1 else f" for {sampler}: with fewer, it has no step at high noise to begin with"
        raise ValueError(f"{flag}steps is {steps}, but must be at least {least}{why}")


def settle_sampling(
    asked: Mapping[str, Any], published: Published, prediction: str, size: tuple[int, int], flag: str = ""
) -> dict[str, Any]:
    """What of the settings of sampling was asked for, and what was published where nothing was (None, or no entry).

    Args:
        asked: steps, guidance, negative_prompt, prompt_template, sampler, flow_shift, grid by name; may hold others.
        prediction: what the model predicts; without a flow, flow_shift and grid stay None.
        size: height and width of the video.
        flag: stands before the names in errors, as "--sample."
    """
    check_sampling(asked, published, prediction, flag)
    usual = {name: getattr(published, name) for name in PUBLISHED}
    if prediction == "flow":
        usual |= {"flow_shift": published.flow_shift or _flow_shift(*size), "grid": "guides"}
    else:
        usual |= {"flow_shift": None, "grid": None}
    return {name: value if asked.get(name) is None else asked[name] for name, value in usual.items()}


def fill_template(template: str, prompt: str) -> str:
    """The prompt as it is encoded."""
    return template.replace("{}", prompt)


PUBLISHED = ("steps", "guidance", "negative_prompt", "prompt_template", "sampler")


def check_frames(frames: int, published: Published, other_frames: bool, flag: str = "") -> None:
    """ValueError for a length that the weights were not trained for, unless `other_frames`."""
    only = published.trained_frames
    if only is None or frames == only or other_frames:
        return
    raise ValueError(
        f"{flag}frames {frames}: these weights were trained on videos of {only} frame(s) only, and others come out as "
        f"noise: ask for {only}, or leave it out. For weights that you trained on {frames}: {flag}other_frames true"
    )


def _flow_shift(height: int, width: int) -> float:
    """3 for 480p and 5 for 720p; midway between the two areas it changes, so that every size has an answer."""
    return 3.0 if height * width < (480 * 832 + 720 * 1280) / 2 else 5.0
