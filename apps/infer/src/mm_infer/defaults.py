"""What is usual for a model and a task, where nothing is asked for: the numbers of its guides and publishers."""

from dataclasses import dataclass, replace

from mm_infer.config import Options, Task, check_size
from mm_models.wan import WanConfig

# The lists of the guides: English for Wan2.1, Chinese, which says the same, for Wan2.2.
NEGATIVE_PROMPT = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, "
    "overall gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn "
    "hands, poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy background, "
    "three legs, many people in the background, walking backwards"
)
CHINESE_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"  # noqa: RUF001
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"  # noqa: RUF001
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)
P480, P720 = (480, 832), (720, 1280)


@dataclass(frozen=True)
class Usual:
    """Of one model and task. flow_shift None: 3 for 480p, 5 for 720p."""

    size: tuple[int, int] = P480  # height, width
    frames: int = 81
    fps: float = 16
    steps: int = 50
    guidance: float | tuple[float, float] = 5.0
    flow_shift: float | None = None
    negative_prompt: str = NEGATIVE_PROMPT


WAN21 = Usual()
WAN21_I2V = Usual(steps=40)
WAN21_FLF2V = Usual(P720, guidance=5.5, flow_shift=16)
VACE = Usual(flow_shift=16)
A14B = Usual(P720, steps=40, guidance=(4.0, 3.0), flow_shift=12, negative_prompt=CHINESE_NEGATIVE_PROMPT)
A14B_I2V = replace(A14B, guidance=3.5, flow_shift=5)
A14B_VACE = replace(A14B, steps=50, guidance=5.0)
TI2V_5B = Usual((704, 1280), frames=121, fps=24, flow_shift=5, negative_prompt=CHINESE_NEGATIVE_PROMPT)


def usual(config: WanConfig, task: Task, experts: bool, model: str | None = None) -> Usual:
    """By the architecture, whether there are two experts, and the preset's name, if one was given: the 480P and the
    720P weights of image-to-video differ in nothing else.
    """
    if config.out_channels == 48:
        return TI2V_5B
    if experts:
        return A14B_VACE if task == "vace" else A14B_I2V if task in ("i2v", "flf2v") else A14B
    if task == "i2v":
        return replace(WAN21_I2V, size=P720) if model and model.endswith("720p") else WAN21_I2V
    if task == "flf2v":
        return WAN21_FLF2V
    chosen = VACE if task == "vace" else WAN21
    return replace(chosen, size=P720) if config.dim >= 5120 else chosen  # the 14B


def completed(options: Options, task: Task, size: tuple[int, int], frames: int, fps: float, usual: Usual) -> Options:
    """The options with nothing left open."""
    flow_shift = options.flow_shift or usual.flow_shift
    if flow_shift is None:
        # Midway between the two areas that the guides name, so that every size has an answer.
        flow_shift = 3.0 if size[0] * size[1] < (480 * 832 + 720 * 1280) / 2 else 5.0
    return replace(
        options,
        task=task,
        height=size[0],
        width=size[1],
        frames=frames,
        fps=fps,
        flow_shift=flow_shift,
        steps=options.steps or usual.steps,
        guidance=usual.guidance if options.guidance is None else options.guidance,
        negative_prompt=usual.negative_prompt if options.negative_prompt is None else options.negative_prompt,
        strength=(options.strength or 0.7) if task == "v2v" else None,
        control_scale=(1.0 if options.control_scale is None else options.control_scale) if task == "vace" else None,
    )


def size_of(options: Options, usual: Usual, shape: tuple[int, int] | None, multiple: int) -> tuple[int, int]:
    """Height and width of a video; `shape` is that of the picture it is made from, whose proportions it keeps.

    Raises ValueError for sides that cannot be, and for one without the other where there is a shape.
    """
    from mm_data.images import area_size

    check_size(options, multiple)
    if shape is None or None not in (options.height, options.width):
        return options.height or usual.size[0], options.width or usual.size[1]
    if options.height is not None or options.width is not None:
        raise ValueError(
            f"height {options.height}, width {options.width}: give both, or neither to keep the picture's shape "
            f"({shape[0]}x{shape[1]}) at about {usual.size[0]}x{usual.size[1]} pixels"
        )
    return area_size(*shape, usual.size[0] * usual.size[1], multiple)
