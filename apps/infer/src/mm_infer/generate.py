"""The job of the command line: all videos to mp4 files, each rank its share."""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mm_convert import expert_of
from mm_convert.cli.arguments import flags_of
from mm_convert.cli.terminal import one_line
from mm_data import made_with, write_video
from mm_infer.__about__ import __version__
from mm_infer.checks import check_passes
from mm_infer.config import Config, Options
from mm_infer.identity import Contents, digest, identify
from mm_infer.inputs import Given
from mm_infer.lists import Request
from mm_infer.ranks import Share, claim_output
from mm_infer.sample import Sampler
from mm_infer.settle import calls_of
from mm_infer.weights import Weights
from mm_models.diffusion.samplers import fill_template
from mm_models.distilled import describe_distilled
from mm_parallel.attention import activate
from mm_parallel.device import device as accelerator
from mm_parallel.guard import Watchdog, agree
from mm_parallel.guard.agree import ALIKE, COPY


@dataclasses.dataclass(frozen=True)
class Video:
    """One that is made."""

    prompt: str
    given: Given
    options: Options  # all of them
    made_with: dict[str, Any]  # goes into the file


@dataclasses.dataclass(frozen=True)
class Job:
    """What one rank does."""

    sampler: Sampler
    videos: dict[Path, Video]  # by the file that is written
    kept: list[Path]  # there already, made from the same inputs and settings
    rank: int
    leads: bool  # of the ranks that make the same videos, this one decodes and writes
    alone: Path | None = None  # the folder of an expert without the other
    known: str = ""  # what weights or adapters are known for, and which settings are taken from that


def prepare(config: Config, requests: list[Request], weights: Weights, share: Share, rank: int, held: ExitStack) -> Job:
    """Checks all that can be checked without reading a tensor. ValueError or OSError with the way out.

    The output is claimed until `held` is left.
    """
    first, step = share.prompts
    files = {config.output / f"video_{i}.mp4": requests[i] for i in range(first, len(requests), step)}
    sampler = open_sampler(config, weights, share)
    agree(flags_of(config), "the configuration", way_out=ALIKE)
    contents = identify(config, weights.facts)
    agree({f"video {i}": request for i, request in enumerate(requests)}, "what is asked for")
    read = {f"--{flag} {name}": found for flag, those in contents.items() for name, found in those.items()}
    agree(read | {"the boundary of --weights": weights.boundary}, "what is read", way_out=COPY)
    videos = {file: settle_video(config, sampler, request, contents) for file, request in files.items()}
    if share.team is not None:
        made = {
            f"{key} of {file.name}": said for file, video in videos.items() for key, said in video.made_with.items()
        }
        agree(made, "what is made", share.team, COPY)
    claim_output(config.output, held)
    if folders := share.decide(lambda: [file for file in files if file.is_dir()]):
        raise ValueError(f"{folders[0]} is a folder, and a video is to be written there: choose another --output")
    there = share.decide(lambda: [] if config.overwrite else [file for file in files if file.exists()])
    others = share.decide(lambda: [f for f in there if not _is_made(f, videos[f].made_with)])
    if others:
        more = f", and {len(others) - 1} more" if len(others) > 1 else ""
        raise ValueError(
            f"{others[0]} is already there{more}, made otherwise or from weights that have changed since: "
            "choose another --output, or replace with --overwrite true"
        )
    with tempfile.TemporaryFile(dir=config.output, prefix=".tmp-", suffix=".mp4"):  # better now than after a video
        pass
    todo = {file: video for file, video in videos.items() if file not in there}
    alone = config.weights if expert_of(config.weights) else None
    known = weights.facts.distilled
    said = describe_distilled(known, vars(config.options)) if known else ""
    return Job(sampler, todo, there, rank, share.leads, alone, said)


def open_sampler(config: Config, weights: Weights, share: Share) -> Sampler:
    """What makes the videos of such a command on this rank. ValueError for what cannot run here."""
    dtype = None if config.dtype is None else getattr(torch, config.dtype)
    activate(config.attention, accelerator().type)
    how = {"vae_tiling": config.vae_tiling, "attention": config.attention, "compile": config.compile}
    how |= {"mesh": share.mesh, "pair": share.pair, "base": config.base, "host_layers": config.host_layers}
    return Sampler(weights, None, dtype, config.offload, **how)


def settle_video(config: Config, sampler: Sampler, request: Request, contents: Contents) -> Video:
    """What is asked for, settled, with its record: what repeats the video, and not where in a list it stood."""
    given = Given(**request.given)
    options = sampler.settle(config.options, given)
    check_passes(config, options)
    record: dict[str, Any] = {"prompt": request.prompt} | given.record() | dataclasses.asdict(options)
    record |= {name: getattr(config, name) for name in ("weights", "encoders", "model", "text_tokens")}
    record["lora"] = [str(path) for path in config.lora] if isinstance(config.lora, list) else config.lora
    if config.lora_strength != 1.0:
        record["lora_strength"] = config.lora_strength
    record |= {"contents": digest(contents)}
    if (known := sampler.weights.facts.distilled) is not None:
        record["known_as"] = known.name
    if config.lora_alpha is not None:
        record["lora_alpha"] = config.lora_alpha
    if config.attention != "auto":
        record["attention"] = config.attention
    if config.base != "dtype":
        record["base"] = config.base
    if config.compile:
        record["compile"] = True
    record |= {"vae_tiling": sampler.encoders.tiling, "boundary": sampler.weights.boundary}
    record |= {"dtype": str(sampler.dtype).removeprefix("torch."), "mm_infer": __version__, "torch": torch.__version__}
    return Video(request.prompt, given, options, {k: str(v) if isinstance(v, Path) else v for k, v in record.items()})


def _is_made(file: Path, record: dict[str, Any]) -> bool:
    """Whether this is the video that `record` would make again."""
    try:
        return made_with(file) == json.loads(json.dumps(record))
    except (ValueError, OSError):  # no video, or not one of ours
        return False


def run(job: Job, guard: Watchdog, patience: float) -> None:
    """Makes the videos, and says so: bars on a terminal, plain lines elsewhere.

    guard, patience: of the ranks, and the seconds that anything but a step may take.
    OSError when a disk is full, FloatingPointError for latents that are not finite, MemoryError for too large a video.
    """
    say = _say if job.rank == 0 else lambda text: None
    say_own = _say if job.leads else lambda text: None
    total = dict.fromkeys(("text", "inputs", "load", "denoise", "decode", "write"), 0.0)
    for file in job.kept:
        say_own(f"{file}: kept, made by the same command (--overwrite true makes it again)")
    if not job.videos:
        return None if job.kept else say_own(f"rank {job.rank} has nothing to do: there are fewer videos than ranks")

    videos = list(job.videos.values())
    if job.alone:
        say(f"note: {job.alone} is one of two experts, and makes all steps alone; name the folder above it for both")
    say(f"attention: {job.sampler.kernel}")
    if job.known:
        say(job.known)
    start = time.perf_counter()
    prompts = [fill_template(video.options.prompt_template, video.prompt) for video in videos]
    say(f"text: encoding {len(set(prompts))} prompt(s)")
    negative = [video.options.negative_prompt for video in videos if max(video.options.scales) > 1]
    job.sampler.encode([*prompts, *negative])
    total["text"] = time.perf_counter() - start
    start = time.perf_counter()
    job.sampler.encoders.see_all([(video.given, video.options) for video in videos])
    total["inputs"] = time.perf_counter() - start

    for number, (file, video) in enumerate(job.videos.items(), 1):
        name = f"{file.name} ({number}/{len(videos)})"
        guard.at(f"the model, and what {file.name} is made from", patience)
        with enough_memory(video.options), _progress(job, video.options, name) as show:
            progress = _watched(show, guard, patience, file.name, video.options)
            result = job.sampler.run(video.prompt, video.options, video.given, progress=progress, decode=job.leads)
        if not job.leads:
            continue
        start = time.perf_counter()
        write_video(file, result.frames.numpy(), video.options.fps, video.made_with)
        seconds = result.seconds | {"write": time.perf_counter() - start}
        total = {stage: spent + seconds[stage] for stage, spent in total.items()}
        skipped = f", layers skipped in {result.skipped:.0%} of the model's calls" if result.skipped else ""
        _say(f"{file}: {sum(seconds.values()):.1f} s, {video.prompt!r}{skipped}")
    stages = ", ".join(f"{stage} {spent:.1f} s" for stage, spent in total.items())
    say_own(f"{len(videos)} video(s) in {sum(total.values()):.1f} s: {stages}")


def _watched(
    show: Callable, guard: Watchdog, patience: float, name: str, options: Options
) -> Callable[[int, Tensor], None]:
    """`show`, which also tells the watchdog that a step is done."""
    last = calls_of(options)

    def told(done: int, latents: Tensor) -> None:
        show(done, latents)
        if done < last:
            guard.at(f"step {done + 1} of {name}")
        else:
            guard.at(f"decoding and writing {name}", patience)

    return told


@contextmanager
def enough_memory(options: Options) -> Iterator[None]:
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
    tqdm.write(one_line(text))  # around a bar, if there is one
    sys.stdout.flush()


@contextmanager
def _progress(job: Job, options: Options, name: str) -> Iterator[Any]:
    """A bar on a terminal, of rank 0; elsewhere a line every tenth of the way."""
    steps = calls_of(options)
    if job.rank == 0 and sys.stderr.isatty():
        with tqdm(total=steps, desc=name, unit="step", leave=False) as bar:
            yield lambda done, latents: bar.update()
    else:
        marks = {round(steps * tenth / 10) for tenth in range(1, 11)} if job.leads else set()
        yield lambda done, latents: _say(f"{name}: step {done} of {steps}") if done in marks else None
