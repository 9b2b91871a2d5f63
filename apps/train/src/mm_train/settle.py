"""What is left open of the videos drawn during training, settled by what the model was published with.

This file imports no torch: a setting that does not fit is refused at once.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mm_models.diffusion.samplers import settle_sampling
from mm_models.distilled import describe_distilled, find_distilled, settle_distilled
from mm_models.families import find
from mm_models.family import Distilled
from mm_train.config import Config, SampleConfig
from mm_train.objective import architecture


def find_known(config: Config) -> Distilled | None:
    """What the weights, or the adapter of sample videos, are known for by name."""
    paths = [config.sample.lora] if config.sample.lora else []
    paths += [Path(config.weights)] if config.weights not in ("", "random") else []
    return find_distilled(architecture(config)[0].video.distilled, paths)


def describe_known_samples(config: Config) -> str:
    """What of that is taken for sample videos, in words; empty where none are made, or nothing is known."""
    made = config.sample.prompts or config.sample.from_validation
    if not made or architecture(config)[0].video is None or (known := find_known(config)) is None:
        return ""
    return describe_distilled(known, vars(config.sample), "--sample.")


def settle_samples(config: Config) -> SampleConfig:
    """`config.sample` with nothing left open, by the rule of mm_infer. ValueError for settings that do not go together.

    A length that the published weights do not make is allowed: a run may train them for it.
    """
    family, shape = architecture(config)
    asked, usual = config.sample, family.video.sized(find(config.model)[1].published, shape)
    usual = settle_distilled(usual, find_known(config))
    height, width = asked.height or usual.size[0], asked.width or usual.size[1]
    sampling = settle_sampling(vars(asked), usual, family.video.prediction(shape), (height, width), "--sample.")
    del sampling["grid"]  # always the usual one
    frames, fps = asked.frames or usual.frames, asked.fps or usual.fps
    return replace(asked, height=height, width=width, frames=frames, fps=fps, **sampling)
