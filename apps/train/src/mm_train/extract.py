"""Encode the videos, captions and conditions of a manifest once: ``python -m mm_train.extract``.

This file imports no torch, so that a command that cannot work is refused at once; the work is in `mm_train.extraction`.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from mm_convert.cli.arguments import parse
from mm_convert.cli.terminal import escaped_output
from mm_convert.cli.values import check_config
from mm_data import Geometry
from mm_models.families import find
from mm_models.family import AskedTiling
from mm_parallel.launch import read_launch
from mm_train.checks.paths import check_encoders, check_manifest
from mm_train.command import run
from mm_train.interrupt import ending_signals
from mm_train.objective import choose_task
from mm_train.recipe import find_recipe


@dataclass
class Data:
    manifest: Path
    """A folder of clips and pictures with a .txt beside each; data.txt, data.json or .jsonl in the format of
    MindSpeed-MM, or a folder with annotation.json in it or in its folders; or a TOML of sets of these, with repeats,
    weights, sizes.
    """
    workers: Annotated[int, ">= 0", "<= 256"] = 2
    """Decoding processes per rank."""
    caption: str | None = None
    """What stands for the caption of a sample that has none; empty text is the empty prompt."""


@dataclass
class ExtractConfig:
    """Encode videos and captions into a feature cache that mm_train reads."""

    model: str
    """Preset that the features are for."""
    encoders: Path
    """Diffusers directory with vae/, text_encoder/ and tokenizer/, and image_encoder/ for models with CLIP."""
    output: Path
    """Directory of the cache; may hold an earlier, unfinished extraction."""
    data: Data
    task: str = "auto"
    """What the features are for; auto: what the model was made for. Of Wan: t2v, i2v, flf2v, ti2v or vace."""
    geometry: Geometry = field(default_factory=Geometry)  # or that of the model's recipe
    batch: Annotated[int, ">= 1"] = 1
    """Clips of one shape that are encoded together."""
    seed: Annotated[int, ">= 0", "<= 9223372036854775807"] = 42
    """Of the random frame windows."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the text encoder; the VAE and CLIP run in float32."""
    tiling: AskedTiling = None
    """Let the VAE work in tiles: less memory, slightly other numbers at the seams. By default as the makers did: Wan
    whole, Open-Sora-Plan in tiles of training; true takes these, inference those of sampling.
    """
    deadline: Annotated[float, ">= 10", "<= 604800"] = 1800
    """On several ranks: seconds that the clips of one batch may take; then all end and say which rank hangs, and
    where.
    """

    def check(self) -> None:
        """ValueError for what cannot work, found without torch."""
        family, preset = find(self.model)
        video = family.need_video(
            "nothing is extracted for it, as it is trained straight from them: give `python -m mm_train --model "
            f"{self.model} --data.conversations …`"
        )
        check_manifest(self.data.manifest)
        check_encoders(video, self.encoders, video.encoders(preset.config), "--encoders")
        check_config(self, "--")
        choose_task(self.model, family, preset.config, self.task, "--task")

    @property
    def chosen_task(self) -> str:
        family, preset = find(self.model)
        return choose_task(self.model, family, preset.config, self.task, "--task")


def extract(config: ExtractConfig) -> int:
    """Run the extraction; returns how many samples of the manifest have no features in the end."""
    config.check()
    from mm_train.extraction import encode_all  # torch, only now

    return encode_all(config)


@escaped_output()
def main(argv: list[str] | None = None) -> None:
    def read() -> ExtractConfig:
        read_launch()
        geometry = find_recipe(sys.argv[1:] if argv is None else argv).get("data", {}).get("geometry", {})
        config = parse(
            ExtractConfig,
            argv,
            prog="python -m mm_train.extract",
            description=ExtractConfig.__doc__,
            defaults=[{"geometry": geometry}],
        )
        config.check()
        return config

    def work(config: ExtractConfig) -> None:
        try:
            extract(config)
            from mm_parallel.device import leave

            leave()
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; what was encoded is kept, the same command continues") from None

    for ending in ending_signals():
        signal.signal(ending, signal.default_int_handler)
    run(read, work)


if __name__ == "__main__":
    main()
