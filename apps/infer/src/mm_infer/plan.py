"""What is left open in the options, settled by the model, the task, and what the video is made from."""

from mm_infer.config import Options
from mm_infer.defaults import Usual, completed, size_of, usual
from mm_infer.inputs import Given, footage, is_still, masking, picture
from mm_infer.tasks import check_used, choose_task
from mm_models.diffusion.sampling import first_step
from mm_models.wan import WanConfig


def plan(
    options: Options, given: Given, config: WanConfig, *, experts: bool, model: str | None, ti2v: bool, multiple: int
) -> Options:
    """The options with nothing left open, after a look at everything that is given.

    model: the preset's name, if one was given. ti2v: see `choose_task`. multiple: of what both sides must be one.

    Raises ValueError for a task that the model cannot do, a size or length that cannot be, and a file that is broken.
    """
    task = choose_task(config, options.task, given.there(), ti2v)
    check_used(options, task, config, experts)
    common = usual(config, task, experts, model)
    shape, frames, fps = _looked_at(options, given, common)
    if task == "flf2v" and frames < 5:
        raise ValueError(f"frames {frames}: from a first to a last image, at least 5 are needed")
    full = completed(options, task, size_of(options, common, shape, multiple), frames, fps, common)
    start_of(full)
    return full


def start_of(options: Options) -> int:
    """Steps that are left out. ValueError if nothing is left of them."""
    return first_step(options.steps, options.strength) if options.task == "v2v" else 0


def _looked_at(options: Options, given: Given, common: Usual) -> tuple[tuple[int, int] | None, int, float]:
    """Height and width of the first image or the source video (None without), frames and their rate."""
    shape, frames, fps = None, options.frames or common.frames, options.fps or common.fps
    if given.image is not None:
        shape = picture(given.image).shape[:2]
    if given.video is not None:
        source = footage(given.video, fps)
        if options.frames is None:  # a shorter video makes a shorter one
            frames = min(frames, (len(source.indices) - 1) // 4 * 4 + 1)
        source.cut(frames)
        shape, fps = source.shape, source.fps
    if given.mask is not None:
        picture(given.mask) if is_still(given.mask) else masking(given.mask, given.video, fps).cut(frames)
    for image in (given.last_image, *given.references):
        if image is not None:
            picture(image)
    return shape, frames, fps
