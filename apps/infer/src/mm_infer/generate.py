"""The job of the command line: all prompts to mp4 files, each rank its share."""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mm_data import made_with, write_video
from mm_infer.__about__ import __version__
from mm_infer.config import Config, Options
from mm_infer.ranks import Place
from mm_infer.sample import Sampler, load


@dataclasses.dataclass(frozen=True)
class Job:
    """What one rank does."""

    sampler: Sampler
    options: Options
    prompts: dict[Path, str]  # by the file that is written
    kept: list[Path]  # there already, made from the same prompt and settings
    made_with: dict[str, Any]  # goes into every file
    fps: int
    rank: int
    leads: bool  # of the ranks that make the same videos, this one decodes and writes


def prepare(config: Config, place: Place = Place(), rank: int = 0) -> Job:  # noqa: B008 (frozen)
    """Checks all that can be checked without reading a tensor. ValueError or OSError with the way out."""
    prompts = config.prompts()
    first, step = place.prompts
    files = {config.output / f"video_{i}.mp4": prompts[i] for i in range(first, len(prompts), step)}
    blocked = next((path for path in (config.output, *config.output.parents) if path.exists()), config.output)
    if blocked.exists() and not blocked.is_dir():
        raise ValueError(f"output {config.output}: {blocked} is a file, not a folder")
    dtype = None if config.dtype is None else getattr(torch, config.dtype)
    sampler = load(
        config.weights,
        config.encoders,
        model=config.model,
        lora=config.lora,
        dtype=dtype,
        vae_tiling=config.vae_tiling,
        text_tokens=config.text_tokens,
        mesh=place.mesh,
        pair=place.pair,
    )
    record = _record(config, sampler)
    there = place.decided(lambda: [] if config.overwrite else [file for file in files if file.exists()])
    written = _last_change(config.weights, config.encoders, config.lora)
    others = place.decided(lambda: [f for f in there if not _is_made(f, {"prompt": files[f]} | record, written)])
    if others:
        more = f", and {len(others) - 1} more" if len(others) > 1 else ""
        raise ValueError(
            f"{others[0]} is already there{more}, made otherwise or from weights that have changed since: "
            "choose another --output, or replace with --overwrite true"
        )
    config.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=config.output):  # better now than after the first video
        pass
    options = Options(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Options)})
    todo = {file: prompt for file, prompt in files.items() if file not in there}
    return Job(sampler, options, todo, there, record, config.fps, rank, place.leads)


def _is_made(file: Path, record: dict[str, Any], since: float) -> bool:
    """Whether this is the video that `record` would make again, from weights that have not changed since."""
    try:
        return made_with(file) == json.loads(json.dumps(record)) and file.stat().st_mtime >= since
    except (ValueError, OSError):  # no video, or not one of ours
        return False


def _last_change(*weights: Path | None) -> float:
    """When the newest file of tensors was written: a new export often takes the place of an old one."""
    files = [f for path in weights if path for f in ([path] if path.is_file() else path.rglob("*.safetensors"))]
    return max((file.stat().st_mtime for file in files), default=0.0)


def _record(config: Config, sampler: Sampler) -> dict[str, Any]:
    """The configuration as it goes into each file: what repeats the video, and not where in a list it stood."""
    left_out = ("output", "overwrite", "prompt", "prompt_file", "parallel")
    record = {k: v for k, v in dataclasses.asdict(config).items() if k not in left_out}
    record |= {"dtype": str(sampler.dtype).removeprefix("torch."), "mm_infer": __version__, "torch": torch.__version__}
    return {k: str(v) if isinstance(v, Path) else v for k, v in record.items()}


def run(job: Job) -> None:
    """Makes the videos, and says so: bars on a terminal, plain lines elsewhere.

    OSError when a disk is full, FloatingPointError for latents that are not finite, MemoryError for too large a video.
    """
    say = _say if job.rank == 0 else lambda text: None
    say_own = _say if job.leads else lambda text: None
    total: dict[str, float] = {"text": 0.0, "load": 0.0, "denoise": 0.0, "decode": 0.0, "write": 0.0}
    for file in job.kept:
        say_own(f"{file}: kept, made by the same command (--overwrite true makes it again)")
    if not job.prompts:
        return None if job.kept else say_own(f"rank {job.rank} has nothing to do: there are fewer prompts than ranks")

    start = time.perf_counter()
    negative = [job.options.negative_prompt] if job.options.guidance > 1 else []
    say(f"text: encoding {len(set(job.prompts.values()))} prompt(s)")
    job.sampler.encode([*job.prompts.values(), *negative])
    total["text"] = time.perf_counter() - start

    for number, (file, prompt) in enumerate(job.prompts.items(), 1):
        with _enough_memory(job.options), _progress(job, f"{file.name} ({number}/{len(job.prompts)})") as progress:
            result = job.sampler.run(prompt, job.options, progress=progress, decode=job.leads)
        if not job.leads:
            continue
        start = time.perf_counter()
        write_video(file, result.frames.numpy(), job.fps, {"prompt": prompt} | job.made_with)
        seconds = result.seconds | {"write": time.perf_counter() - start}
        total = {stage: spent + seconds[stage] for stage, spent in total.items()}
        _say(f"{file}: {sum(seconds.values()):.1f} s, {prompt!r}")
    stages = ", ".join(f"{stage} {spent:.1f} s" for stage, spent in total.items())
    say_own(f"{len(job.prompts)} video(s) in {sum(total.values()):.1f} s: {stages}")


@contextmanager
def _enough_memory(options: Options) -> Iterator[None]:
    """The allocator's errors, which have no class of their own on the CPU, as a MemoryError that names the size."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        signs = ("can't allocate memory", "Storage size calculation overflowed")  # on the CPU: a mere RuntimeError
        known = isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in signs)
        if not known:
            raise
        raise MemoryError(
            f"not enough memory for {options.frames} frames of {options.height}x{options.width} (height x width): "
            f"ask for fewer or smaller ones ({error})"
        ) from error


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
        marks = {round(steps * tenth / 10) for tenth in range(1, 11)} if job.leads else set()
        yield lambda done, latents: _say(f"{name}: step {done} of {steps}") if done in marks else None
