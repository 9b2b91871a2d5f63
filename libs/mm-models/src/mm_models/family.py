"""What a model family is to everybody else: one record, asked through the seams below and never by its name.

This file imports no torch: a preset's name is looked up, and a typo answered, without waiting for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mm_models.encoders import Codec, ImageEncoder, TextEncoder
    from mm_models.objective import Objective
    from mm_parallel.plan import ParallelPlan


Program = Literal["training", "inference"]
"""Of which kind a program is: extraction trains."""
Tiling = Literal["none", "training", "inference"]
"""Whether a codec works in tiles, and in those that its makers train or sample with, where these differ."""
AskedTiling = bool | Program | None
"""The flag: true is the program's own kind, null what is usual for the family."""


@dataclass(frozen=True)
class Published:
    """What the makers of released weights sample with."""

    size: tuple[int, int]
    """Height and width in pixels."""
    frames: int
    fps: float
    steps: int
    guidance: float | tuple[float, float]
    """One number, or of two experts that of the high-noise one and that of the low-noise one."""
    flow_shift: float | None
    """Of flow matching. None: 3 for sizes near 480x832, 5 for sizes near 720x1280; or there is no flow to shift."""
    negative_prompt: str
    sampler: str
    """One of `mm_models.diffusion.samplers`."""
    prompt_template: str = "{}"
    """What is put around a prompt, where {} stands."""
    trained_frames: int | None = None
    """The only length that such weights make a video of; None: any."""

    def __post_init__(self) -> None:
        assert self.trained_frames in (None, self.frames), "the usual length is the trained one"
        assert self.prompt_template.count("{}") == 1, "a template has one place for the prompt"


@dataclass(frozen=True)
class Distilled:
    """How weights, or an adapter, sample that were distilled to a few steps. They are known by their file's name."""

    name: str
    """For people."""
    pattern: str
    """A regular expression that the lower-case name of the file, or of a folder just above it, has somewhere."""
    steps: int
    guidance: float
    flow_shift: float
    sampler: str
    source: str
    """Where their authors say so."""

    @property
    def settings(self) -> dict[str, Any]:
        """By the names that they have in `Published` and in flags."""
        return {name: getattr(self, name) for name in ("steps", "guidance", "flow_shift", "sampler")}


@dataclass(frozen=True)
class Preset:
    """A fact about released weights: their architecture, and what was published with them."""

    config: Any
    published: Published | None = None
    """Of a video model."""
    boundary: float | None = None
    """Of two experts of this architecture: the noise level (sigma) from which on the high-noise one generates."""


@dataclass(frozen=True)
class ClipSize:
    """How large a video is that nobody has made yet."""

    frames: int
    height: int
    width: int
    """In pixels, as frames are those of the video."""
    text: int | None = None
    """Rows of its text; None: as many as the model reads."""

    def latents(self, stride: tuple[int, int, int], patch: tuple[int, int, int]) -> tuple[int, int, int]:
        """Frames, rows and columns of its latents.

        stride: frames, rows and columns of pixels per latent; patch: latents per token.
        Raises ValueError for a size that leaves no whole latents and tokens.
        """
        if self.frames < 1 or (self.frames - 1) % stride[0]:
            below = max(0, self.frames - 1) // stride[0] * stride[0] + 1
            raise ValueError(
                f"frames {self.frames} is not {stride[0]}k+1, as the VAE packs {stride[0]} frames after the first: the "
                f"nearest are {below} and {below + stride[0]}"
            )
        rows, columns = (side * tokens for side, tokens in zip(stride[1:], patch[1:], strict=True))
        for name, value, side in (("height", self.height, rows), ("width", self.width, columns)):
            if value < side or value % side:
                below = value // side * side
                nearest = f"{below} and {below + side}" if below else f"{side}"
                raise ValueError(
                    f"{name} {value} is not a multiple of {side} (pixels per latent x latents per token): the nearest "
                    f"are {nearest}"
                )
        return (self.frames - 1) // stride[0] + 1, self.height // stride[1], self.width // stride[2]


@dataclass(frozen=True)
class PackSize:
    """How large a pack of conversations is that nobody has made yet."""

    tokens: int
    """Of all of them, those of images included."""
    conversations: int = 1
    """Of equal length, but for the last, which has what is left."""
    patches: int = 0
    """Of all images, at most; each conversation has one image."""
    labels: int | None = None
    """Tokens that are trained; None: all."""


@dataclass(frozen=True)
class Task:
    """What a model can be asked to make. Inputs are named as in `Pixels` and in the flags of mm_infer."""

    name: str
    needs: tuple[str, ...] = ()
    """Inputs besides the prompt that it cannot do without."""
    takes: tuple[str, ...] = ()
    """Inputs that it can be given as well."""
    options: Mapping[str, float] = field(default_factory=dict)
    """Options of sampling that are its own, with their defaults."""
    trained: bool = True
    """Whether a model is trained for it. If not, it is sampling alone that differs."""
    least_frames: int = 1

    @property
    def inputs(self) -> set[str]:
        """All that it can be given."""
        return {*self.needs, *self.takes}

    @property
    def reads_control(self) -> bool:
        """Whether a manifest's sources, masks and references are for it."""
        return "references" in self.inputs

    def __str__(self) -> str:
        """`i2v (image)`"""
        return f"{self.name} ({self.sources})"

    @property
    def sources(self) -> str:
        """What it is made from, in words."""
        may = ", ".join(self.takes)
        return " and ".join(self.needs) or (f"any of {may}, or none" if may else "a prompt alone")


@dataclass(frozen=True)
class Video:
    """What a family of video models has besides: encoders, conditions, and how such a model is sampled from."""

    # Facts about a configuration
    tasks_unasked: Callable[[Any, Path], tuple[Task, ...]]
    """(config, repository of the encoders) -> of the family's tasks, those that may be meant when none is named."""
    encoders: Callable[[Any], tuple[str, ...]]
    """Folders of a diffusers directory that it needs, besides its own."""
    own_folders: Mapping[str, Callable[[Path], Any]] = field(default_factory=dict, kw_only=True)
    """Of these, the ones with files of its own kind: name -> what raises ValueError for a folder that is not right."""
    kinds: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    """Of the other folders with weights, what their config.json must say: diffusers' `_class_name`, or transformers'
    `model_type`.
    """
    multiples: Callable[[Any, Path], tuple[int, int, int]]
    """(config, repository) -> frames per latent frame, rows and columns of pixels per token."""
    fit: Callable[[Any, Path], Any]
    """(config, repository) -> the configuration for these encoders. ValueError unless they are as wide as it takes."""
    prediction: Callable[[Any], str]
    """What such a model predicts: "flow", "epsilon" or "v_prediction". It decides which samplers there are."""

    # What it is told
    conditioning: Callable[[Any, str], Any]
    """(config, task name) -> `mm_models.diffusion.Conditioning`."""
    codec: Callable[..., Codec]
    """(repository, device, dtype, tiling), of which tiling is what `choose_tiling` says."""
    text_encoder: Callable[..., TextEncoder]
    """(config, repository, device, dtype): as long as the model reads."""
    image_encoder: Callable[..., ImageEncoder] | None = None
    sized: Callable[[Published, Any], Published] = lambda published, config: published
    """(what the nearest preset was published with, config) -> the same, with a size and a length that the configuration
    says.
    """
    note_shapes: Callable[[Any, Collection[tuple[int, int, int]]], str | None] = lambda config, shapes: None
    """(config, F H W of the latents of each sample) -> what to tell before training, where the configuration says a
    length or a size that no sample has; else None.
    """
    distilled: tuple[Distilled, ...] = field(default=(), kw_only=True)
    """Distilled weights and adapters that are known by name; see `mm_models.distilled`."""
    tiling: Mapping[Program, Tiling] = field(default_factory=lambda: {"training": "none", "inference": "none"})
    """How the codec works where nothing is asked, in a program that trains or extracts and in one that samples."""

    def choose_tiling(self, asked: AskedTiling, program: Program) -> Tiling:
        """How the codec works: as asked; true is the program's own kind, None what is usual for this family."""
        if asked is None:
            return self.tiling[program]
        return (program if asked else "none") if isinstance(asked, bool) else asked


@dataclass(frozen=True)
class Chat:
    """What a family has whose models read a conversation, with its images and videos, and write the next answer."""

    processing: Callable[..., Any]
    """(hub folder, `mm_data.chat_options.ChatOptions`, config) -> `mm_models.processors.Processing`: what makes tokens,
    labels and pixels of a conversation, and text of an answer.
    """
    generator: Callable[..., Any]
    """(config, tensors by our names, device, dtype) -> generator(prompt, *, max_new_tokens, stop_ids, banned_ids,
    temperature, seed) -> the tokens of an answer: what `mm_infer.chat` answers with. `prompt` is what a processing
    makes.
    """
    files: tuple[str, ...]
    """Of a hub folder, the names of the files of processor, tokenizer and template: they go with the weights."""


@dataclass(frozen=True)
class Family:
    """A model family. Configurations (`config`) are of its own dataclass; what needs torch is imported when called.

    It makes videos or answers: one of `video` and `chat` is there, with all that only such a family has.
    """

    name: str
    presets: Mapping[str, Preset]
    config: type
    """The dataclass of its architectures."""
    checkpoints: tuple[str, ...]
    """Families of mm_convert whose weights are this one's."""

    # Facts about a configuration
    tasks: Callable[[Any], tuple[Task, ...]]
    """What such a model can be asked for, the usual first."""
    describe: Callable[[Any], dict[str, Any]]
    """The fields that are written into config.json."""

    # The model
    build: Callable[[Any], nn.Module]
    """A model with parameters that are not filled."""
    plan: Callable[[nn.Module], ParallelPlan]
    """How `mm_parallel` may cut it."""
    cost: Callable[[nn.Module], Callable[[Mapping[str, Any]], tuple[int, float]]]
    """model -> (tensors of a batch -> its tokens, FLOPs of training on it). Where the family reads conversations, this
    has a method, too: `weigh(mm_data.processing.Size)`, the FLOPs of one. By it ranks are balanced.
    """
    lora_targets: tuple[str, ...]
    """The linears that usually get an adapter, by the ends of their names."""
    start: Callable[[], Any]
    """The module with `initial`, `missing`, `grow`, `ZERO` and `GROWN`; see `mm_models.wan.start`."""

    # What it learns
    objective: Callable[..., Objective]
    """(config, task name, expert, boundary, and the options below) -> what it is trained to do."""
    objective_options: Mapping[str, Any]
    """Options of the objective that a user may set, with what the makers train with."""
    example: Callable[[Any, str, Any], dict[str, Tensor]]
    """(config, task name, `ClipSize` or `PackSize`) -> the tensors of one sample as features hold it (without a batch
    dim), or of one pack, on the meta device but for those whose values the objective asks for: what is counted on
    before there is data. ValueError for a size that the model does not take.
    """
    video: Video | None = None
    """Of a family of video models."""
    chat: Chat | None = None
    """Of a family of conversation models."""
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Parts of its models that can be trained, frozen or given a learning rate by name: patterns of parameters."""
    unadapted: tuple[str, ...] = ()
    """Linears that take no adapter, by name: the model multiplies by their weight itself, and would pass it over."""
    unserved: tuple[str, ...] = ()
    """Of the parts, those whose adapters servers leave out unless they are told otherwise."""
    exported: str = "mm"
    """The form in which trained weights are written: "mm", our own, or a dialect of its names in mm_convert."""
    unseen: tuple[str, ...] = ()
    """Fields of a configuration in which released weights differ and their tensors do not. Where no config.json says
    them, mm_infer must be told the preset; where it does, mm_train may go on with others, and says so.
    """

    def __post_init__(self) -> None:
        assert (self.video is None) != (self.chat is None), f"{self.name} makes videos or answers, and not both"

    def task(self, config: Any, name: str) -> Task | None:
        """One of its tasks by name."""
        return next((task for task in self.tasks(config) if task.name == name), None)

    def need_chat(self, instead: str) -> Chat:
        """What it has of conversations. ValueError for a family that has none; `instead`: the command to give."""
        if self.chat is None:
            raise ValueError(f"weights of {self.name} make videos and answer no question: {instead}")
        return self.chat

    def need_video(self, instead: str) -> Video:
        """What it has of videos. ValueError for a family that makes none; `instead`: the command to give."""
        if self.video is None:
            raise ValueError(f"weights of {self.name} read conversations and make no video: {instead}")
        return self.video


def later(module: str, name: str) -> Callable[..., Any]:
    """A function or class of a module that is imported when it is first called."""

    def call(*args: Any, **named: Any) -> Any:
        return getattr(import_module(module), name)(*args, **named)

    call.__qualname__ = f"{module}.{name}"
    return call
