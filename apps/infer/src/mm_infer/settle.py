"""What is left open in the options, settled by the model, the task, and what the video is made from.

A task's facts and the published numbers are the family's; here they meet what was asked for.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, replace
from difflib import get_close_matches
from math import lcm
from pathlib import Path

import mm_data
from mm_infer.config import Options
from mm_infer.inputs import Given, footage, masking, picture
from mm_infer.weights import Facts, must_exist
from mm_models.diffusion.samplers import check_frames, check_sampling, count_calls, settle_sampling
from mm_models.families import FAMILIES
from mm_models.family import Published, Task


def settle(options: Options, given: Given, facts: Facts) -> Options:
    """The options with nothing left open, after a look at everything that is given.

    Raises ValueError for a task that the model cannot do, a size or length that cannot be, and a file that is broken.
    """
    task = check(options, given, facts)
    usual = facts.published
    time, *sides = facts.family.video.multiples(facts.config, facts.repository)
    shape, frames, fps = _look(options, given, usual, time)
    if frames < task.least_frames:
        raise ValueError(f"frames {frames}: for task {task.name} at least {task.least_frames} are needed")
    check_frames(frames, usual, options.other_frames)
    height, width = _size(options, usual.size, shape, lcm(*sides))
    settled = replace(
        options,
        task=task.name,
        height=height,
        width=width,
        frames=frames,
        fps=fps,
        **settle_sampling(vars(options), usual, facts.prediction, (height, width)),
        **{name: value for name, value in task.options.items() if getattr(options, name) is None},
    )
    _check_guidance(settled, facts)
    start_of(settled)
    return settled


def start_of(options: Options) -> int:
    """Steps that are left out, of a video that begins from another one. ValueError if nothing is left of them."""
    from mm_models.diffusion.sampling import first_step

    return 0 if options.strength is None else first_step(options.steps, options.strength)


def calls_of(options: Options) -> int:
    """How often the progress of a video is reported: the steps that its sampler makes."""
    return count_calls(options.sampler, options.steps, start_of(options))


def check(options: Options, given: Given, facts: Facts) -> Task:
    """The task that is meant. Here, without torch, all is refused that can be before a file is opened: ValueError."""
    task = choose_task(facts, options.task, given.there())
    if options.clip_crop and "image_encoder" not in facts.family.video.encoders(facts.config):
        raise ValueError("clip_crop is for models with CLIP, and this has none: leave it out")
    for name, tasks in own_options().items():
        value = getattr(options, name)
        if value is not None and name not in task.options:
            raise ValueError(f"{name} {value} is for task {' or '.join(tasks)}, but this is {task.name}: leave it out")
    check_sampling(vars(options), facts.published, facts.prediction)
    if options.guidance is not None:
        _check_guidance(options, facts)
    if options.frames is not None:
        check_frames(options.frames, facts.published, options.other_frames)
    time, *sides = facts.family.video.multiples(facts.config, facts.repository)
    if options.frames is not None and (options.frames - 1) % time:
        raise ValueError(
            f"frames {options.frames}: the VAE turns {time}k+1 frames into k+1, so ask for "
            f"{_neighbours(options.frames, 1, time)}"
        )
    for name, multiple in zip(("height", "width"), sides, strict=True):
        side = getattr(options, name)
        if side is not None and side % multiple:
            raise ValueError(
                f"{name} {side}: VAE and model divide it by {multiple}, so it must be a multiple of {multiple}, as "
                f"{_neighbours(side, multiple, multiple)}"
            )
    for name, value in given.there().items():
        for path in value if name == "references" else (value,):
            if isinstance(path, str | Path):
                must_exist(Path(path), name)
    return task


def choose_task(facts: Facts, asked: str | None, given: Collection[str]) -> Task:
    """The task asked for, or the one that fits what is given (names of `mm_infer.inputs.Given`).

    Raises ValueError for what the model cannot do, or not with this, saying what it can.
    """
    able = facts.family.tasks(facts.config)
    named = [task for task in able if task.name == asked]
    if asked is not None and not named:
        near = get_close_matches(asked, [task.name for task in able], n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise ValueError(f"task {asked}: these weights can do {_list(able)}{hint}")
    wanted = named or facts.family.video.tasks_unasked(facts.config, facts.repository)
    if "mask" in given and "video" not in given and any("mask" in task.inputs for task in able):
        raise ValueError("mask says which pixels of video change: give video as well")

    def fits(task: Task) -> bool:
        return {*task.needs} <= {*given} <= task.inputs

    for task in wanted:
        if fits(task):
            return task
    had = ", ".join(sorted(given)) or "a prompt alone"
    if named:
        raise ValueError(f"task {asked} makes a video from {named[0].sources}, not from {had}")
    others = [task.name for task in able if fits(task)]  # of which none is meant unless it is named
    hint = f"; weights that were trained for it: task {' or '.join(others)}" if others else ""
    raise ValueError(f"these weights cannot make a video from {had}, but do {_list(wanted)}{hint}")


def _list(tasks: Collection[Task]) -> str:
    """`t2v (a prompt alone), v2v (video)`"""
    return ", ".join(map(str, tasks))


def own_options() -> dict[str, list[str]]:
    """The options that are a task's own, with the names of the tasks, of any model, that have it."""
    tasks = [task for family in FAMILIES for preset in family.presets.values() for task in family.tasks(preset.config)]
    names = [field.name for field in fields(Options)]
    having = {name: list(dict.fromkeys(task.name for task in tasks if name in task.options)) for name in names}
    return {name: tasks for name, tasks in having.items() if tasks}


def _check_guidance(options: Options, facts: Facts) -> None:
    if options.scales[0] != options.scales[1] and not facts.experts:
        raise ValueError(f"guidance {list(options.scales)}: two numbers are for two experts, and this is one model")


def _look(options: Options, given: Given, usual: Published, time: int) -> tuple[tuple[int, int] | None, int, float]:
    """Height and width of the first image or the source video (None without), frames and their rate."""
    shape, frames, fps = None, options.frames or usual.frames, options.fps or usual.fps
    if given.image is not None:
        shape = picture(given.image).shape[:2]
    if given.video is not None:
        source = footage(given.video, fps)
        if options.frames is None:  # a shorter video makes a shorter one
            frames = min(frames, (len(source.indices) - 1) // time * time + 1)
        source.cut(frames)
        shape, fps = source.shape, source.fps
    if given.mask is not None:
        masking(given, fps, frames)
    for image in (given.last_image, *given.references):
        if image is not None:
            picture(image)
    return shape, frames, fps


def _size(options: Options, usual: tuple[int, int], shape: tuple[int, int] | None, multiple: int) -> tuple[int, int]:
    """Height and width of a video; `shape` is that of the picture it is made from, whose proportions it keeps.

    Raises ValueError for one without the other where there is a shape.
    """
    if shape is None or None not in (options.height, options.width):
        return options.height or usual[0], options.width or usual[1]
    if options.height is not None or options.width is not None:
        raise ValueError(
            f"height {options.height}, width {options.width}: give both, or neither to keep the picture's shape "
            f"({shape[0]}x{shape[1]}) at about {usual[0]}x{usual[1]} pixels"
        )
    return mm_data.area_size(*shape, usual[0] * usual[1], multiple)


def _neighbours(value: int, first: int, step: int) -> str:
    """The values of first, first + step, ... around `value`."""
    below = first + (value - first) // step * step
    return f"{below} or {below + step}" if below >= first else str(first)
