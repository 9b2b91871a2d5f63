"""Which task is meant, by the model and by what is given."""

from collections.abc import Collection

from mm_models.wan.conditions import tasks

from mm_infer.config import Options, Task
from mm_models.wan import WanConfig

NEEDS: dict[Task, tuple[str, ...]] = {
    "t2v": (),
    "i2v": ("image",),
    "flf2v": ("image", "last_image"),
    "ti2v": ("image",),
    "v2v": ("video",),
    "vace": (),
}
TAKES: dict[Task, tuple[str, ...]] = {"vace": ("video", "mask", "references")}


def choose_task(config: WanConfig, asked: Task | None, given: Collection[str], ti2v: bool) -> Task:
    """The task asked for, or the one that fits what is given (names of `mm_infer.inputs.Given`).

    ti2v: whether the weights were published for a clean first frame, so that an image may mean it unasked. Others may
        have been trained so, and must be asked.

    Raises ValueError for what the model cannot do, or not with this, saying what it can.
    """
    able = tasks(config)
    if asked is not None and asked not in able:
        raise ValueError(f"task {asked}: these weights can do {_described(able)}")
    wanted = [asked] if asked else [task for task in able if task != "ti2v" or ti2v]
    if "mask" in given and "video" not in given and "vace" in able:
        raise ValueError("mask says which pixels of video change: give video as well")
    for task in wanted:
        if set(NEEDS[task]) <= set(given) <= {*NEEDS[task], *TAKES.get(task, ())}:
            return task
    had = ", ".join(sorted(given)) or "a prompt alone"
    if asked:
        raise ValueError(f"task {asked} makes a video from {_sources(asked)}, not from {had}")
    hint = "; weights that were trained with a clean first frame: task ti2v" if {*able} - {*wanted} else ""
    raise ValueError(f"these weights cannot make a video from {had}, but do {_described(wanted)}{hint}")


def check_used(options: Options, task: Task, config: WanConfig, experts: bool) -> None:
    """ValueError for an option that this task or model would ignore."""
    if options.clip_crop and config.image_dim is None:
        raise ValueError("clip_crop is for models with CLIP, and this has none: leave it out")
    for name, only in (("strength", "v2v"), ("control_scale", "vace")):
        if getattr(options, name) is not None and task != only:
            raise ValueError(f"{name} {getattr(options, name)} is for task {only}, but this is {task}: leave it out")
    if options.guidance is not None and options.scales[0] != options.scales[1] and not experts:
        raise ValueError(f"guidance {list(options.scales)}: two numbers are for two experts, and this is one model")


def _described(able: Collection[Task]) -> str:
    """`t2v (a prompt alone), v2v (video)`"""
    return ", ".join(f"{task} ({_sources(task)})" for task in able)


def _sources(task: Task) -> str:
    may = ", ".join(TAKES.get(task, ()))
    return " and ".join(NEEDS[task]) or (f"any of {may}, or none" if may else "a prompt alone")
