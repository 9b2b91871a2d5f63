"""The job of the command line: all prompts to mp4 files, each rank its share."""

import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

from mm_data import write_video
from mm_infer.__about__ import __version__
from mm_infer.config import Config, Options
from mm_infer.sample import Sampler, load
from mm_parallel.device import init_distributed


@dataclasses.dataclass(frozen=True)
class Job:
    """What one rank does."""

    sampler: Sampler
    options: Options
    prompts: dict[Path, str]  # by the file that is written
    made_with: dict[str, Any]  # goes into every file
    fps: int
    rank: int


@contextmanager
def ranks() -> Iterator[tuple[int, int]]:
    """(rank, world) as torchrun says, and an end to the process group."""
    joined = dist.is_initialized()
    rank, world, _ = init_distributed()
    try:
        yield rank, world
    finally:
        if dist.is_initialized() and not joined:
            dist.destroy_process_group()


def prepare(config: Config, rank: int = 0, world: int = 1) -> Job:
    """Checks all that can be checked without reading a tensor. ValueError or OSError with the way out."""
    prompts = config.prompts()
    files = {config.output / f"video_{i}.mp4": prompts[i] for i in range(rank, len(prompts), world)}
    there = [file for file in files if file.exists()]
    if there and not config.overwrite:
        raise ValueError(
            f"{there[0]} is already there{f', and {len(there) - 1} more' if len(there) > 1 else ''}: "
            "choose another --output, or replace with --overwrite true"
        )
    dtype = None if config.dtype is None else getattr(torch, config.dtype)
    sampler = load(
        config.weights,
        config.encoders,
        model=config.model,
        lora=config.lora,
        dtype=dtype,
        vae_tiling=config.vae_tiling,
        text_tokens=config.text_tokens,
    )
    config.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=config.output):  # better now than after the first video
        pass
    options = Options(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Options)})
    return Job(sampler, options, files, _record(config, sampler), config.fps, rank)


def _record(config: Config, sampler: Sampler) -> dict[str, Any]:
    """The configuration as it goes into each file: what repeats the video, and not where in a list it stood."""
    left_out = ("output", "overwrite", "prompt", "prompt_file")
    record = {k: v for k, v in dataclasses.asdict(config).items() if k not in left_out}
    record |= {"dtype": str(sampler.dtype).removeprefix("torch."), "mm_infer": __version__, "torch": torch.__version__}
    return {k: str(v) if isinstance(v, Path) else v for k, v in record.items()}


def run(job: Job) -> None:
    """Makes the videos, and says so: bars on a terminal, plain lines elsewhere. OSError when a disk is full."""
    say = _say if job.rank == 0 else lambda text: None
    total: dict[str, float] = {"text": 0.0, "load": 0.0, "denoise": 0.0, "decode": 0.0, "write": 0.0}
    if not job.prompts:
        return _say(f"rank {job.rank} has nothing to do: there are fewer prompts than ranks")

    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    start = time.perf_counter()
    negative = [job.options.negative_prompt] if job.options.guidance > 1 else []
    say(f"text: encoding {len(set(job.prompts.values()))} prompt(s)")
    job.sampler.encode([*job.prompts.values(), *negative])
    total["text"] = time.perf_counter() - start

    for number, (file, prompt) in enumerate(job.prompts.items(), 1):
        with _progress(job, f"{file.name} ({number}/{len(job.prompts)})") as progress:
            result = job.sampler.run(prompt, job.options, progress=progress)
        start = time.perf_counter()
        write_video(file, result.frames.numpy(), job.fps, {"prompt": prompt} | job.made_with)
        seconds = result.seconds | {"write": time.perf_counter() - start}
        total = {stage: spent + seconds[stage] for stage, spent in total.items()}
        _say(f"{file}: {sum(seconds.values()):.1f} s, {prompt!r}")
    stages = ", ".join(f"{stage} {spent:.1f} s" for stage, spent in total.items())
    _say(f"{len(job.prompts)} video(s) in {sum(total.values()):.1f} s: {stages}")


def _say(text: str) -> None:
    tqdm.write(text)  # around a bar, if there is one
    sys.stdout.flush()


@contextmanager
def _progress(job: Job, name: str) -> Iterator[Any]:
    """A bar on a terminal, of rank 0; elsewhere a line every tenth of the way."""
    steps = job.options.steps
    if job.rank == 0 and sys.stderr.isatty():
        with tqdm(total=steps, desc=name, unit="step", leave=False) as bar:
            yield lambda done, latents: bar.update()
    else:
        marks = {round(steps * tenth / 10) for tenth in range(1, 11)}
        yield lambda done, latents: _say(f"{name}: step {done} of {steps}") if done in marks else None
