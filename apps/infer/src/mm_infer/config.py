"""What can be asked for: the same names as flags of the command line and as arguments of a Sampler."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

from mm_convert.cli.values import check_config
from mm_infer.loras import read_loras
from mm_models.diffusion.samplers import Grid, SamplerName
from mm_models.family import AskedTiling
from mm_parallel.config import AttentionName, Base

Boundary = Annotated[float, "> 0", "< 1"] | None
Strength = Annotated[float, "!= 0"]
Scale = Annotated[float, ">= 1"]


@dataclass(kw_only=True)
class Options:
    """How one video is made. None takes what was published with the model, see `mm_infer.settle`."""

    task: str | None = None
    "t2v text, i2v image, flf2v first and last image, ti2v a clean first frame, v2v video, vace control to video (default: by the model and by what is given)"  # noqa: E501
    negative_prompt: str | None = None
    "what to stay away from; not used with guidance 1 (default: Wan: MindSpeed-MM's list, in Chinese for Wan2.2; Open-Sora-Plan: its makers')"  # noqa: E501
    prompt_template: str | None = None
    "what is put around each prompt, where {} stands; default: as the model was published, which is {} alone for Wan"
    height: Annotated[int, ">= 1", "<= 16384"] | None = None
    "pixels, a multiple of 16 (32 for Wan2.2 5B); default that of the weights: Wan 480, 704 for the 5B, 720 for 14B t2v, flf2v, VACE and A14B; Open-Sora-Plan 480 or 720; with an image or a source video its shape, in about that area"  # noqa: E501
    width: Annotated[int, ">= 1", "<= 16384"] | None = None
    "pixels, likewise; default Wan 832, 1280; Open-Sora-Plan 640, 1280"
    frames: Annotated[int, ">= 1", "<= 100000"] | None = None
    "4k+1 frames; default Wan 81, 121 for the 5B, at most those of a source video; Open-Sora-Plan those of the weights, 29 or 93"  # noqa: E501
    other_frames: bool = False
    "weights that make one length of video only: make another one, for weights that you trained on it"
    fps: Annotated[float, "> 0", "<= 240"] | None = None
    "frames per second of the mp4, and of what is taken from a source video; default Wan 16, 24 for the 5B; Open-Sora-Plan 24"  # noqa: E501
    steps: Annotated[int, ">= 1", "<= 1000"] | None = None
    "denoising steps; each runs the model twice, or once with guidance 1; pndm makes 9 calls more; default Wan 50, 40 for i2v and A14B; Open-Sora-Plan 100"  # noqa: E501
    guidance: Scale | tuple[Scale, Scale] | None = None
    "weight of the prompt against the negative prompt, 1 leaves that out; two experts may have two, [high, low]; default Wan 5, flf2v 5.5, A14B [4, 3], A14B i2v 3.5; Open-Sora-Plan 7.5, 29x480p 2.5"  # noqa: E501
    flow_shift: Annotated[float, "> 0"] | None = None
    "flow matching: bends the steps towards noise; default 3 for 480p and 5 for 720p, whichever the size is nearer to; flf2v and VACE 16, A14B 12, A14B i2v and 5B 5"  # noqa: E501
    sampler: SamplerName | None = None
    "flow matching (Wan): unipc, euler; models that predict noise or v: euler_ancestral, pndm, ddim, ddpm; default: that which the model was published with, unipc for Wan, euler_ancestral for Open-Sora-Plan"  # noqa: E501
    grid: Grid | None = None
    "flow matching: noise levels of the steps, as in MindSpeed-MM and diffusers before 0.37 (guides, the default), or as in later diffusers"  # noqa: E501
    seed: Annotated[int, ">= 0", "<= 9223372036854775807"] = 0
    "of the initial noise, the same for every prompt, and of the noise that euler_ancestral and ddpm add"
    clip_crop: bool = False
    "i2v, flf2v with CLIP: it sees the middle square of an image, as in diffusers; by default all of it, squashed, as in MindSpeed-MM and in training"  # noqa: E501
    strength: Annotated[float, "> 0", "<= 1"] | None = None
    "v2v: part of the steps that are made, 1 leaves nothing of the video; default 0.7"
    control_scale: Annotated[float, ">= 0"] | None = None
    "vace: strength of the control; default 1"
    first_block_cache: Annotated[float, "> 0", "<= 1"] | None = None
    "skip layers in steps whose first layer changes by less than this share, e.g. 0.05: faster, and another video; by default none is skipped"  # noqa: E501

    def __post_init__(self) -> None:
        check_config(self)

    @property
    def scales(self) -> tuple[float, float]:
        """Guidance at high and at low noise."""
        return self.guidance if isinstance(self.guidance, tuple | list) else (self.guidance, self.guidance)


@dataclass(frozen=True)
class Ranks:
    """How many of torchrun's ranks make one video together; what is left of them makes others."""

    cp: Annotated[int, ">= 1"] | None = None
    "ranks that share the tokens of a video: Ulysses, or ulysses x ring"
    ulysses: Annotated[int, ">= 1"] | None = None
    "of these, ranks that exchange tokens for heads"
    ring: Annotated[int, ">= 1"] | None = None
    "of these, ranks that pass keys and values around"
    guidance: Literal[1, 2] = 1
    "2: the passes with the prompt and with the negative prompt run at the same time, on ranks of their own"


@dataclass(kw_only=True)
class Config(Options):
    """Generate videos from text, images and videos. Under torchrun, ranks share the videos, or the work on each (see
    parallel)."""

    weights: Path
    "a diffusers directory (transformer, vae, text_encoder, tokenizer), or the transformer alone: converted or original; two experts as transformer/ and transformer_2/, or high_noise_model/ and low_noise_model/"  # noqa: E501
    output: Path
    "folder for video_0.mp4, video_1.mp4, ...; made if it is missing"
    model: str | None = None
    "preset, as wan2.1-t2v-1.3b; only needed where the weights do not say what they are"
    encoders: Path | None = None
    "diffusers directory of the vae, text_encoder, tokenizer (and image_encoder), where the weights hold only the transformer"  # noqa: E501
    prompt: str | None = None
    "what to show"
    prompt_file: Path | None = None
    "text file with one prompt per line; empty lines are left out"
    image: Path | None = None
    "i2v, flf2v, ti2v: the first frame, cropped to the shape of the video"
    image_file: Path | None = None
    "text file with one image per line, for the prompts in their order; flf2v: first and last, as a.png, b.png"
    last_image: Path | None = None
    "flf2v: the last frame"
    video: Path | None = None
    "v2v: what to change; vace: what controls (depth, pose, ...), or the video that is edited where the mask says"
    video_file: Path | None = None
    "text file with one video per line"
    mask: Path | None = None
    "vace: a video, or one image for all frames; white changes, black is kept (default: all changes)"
    mask_file: Path | None = None
    "text file with one mask per line"
    references: Path | list[Path] | None = None
    'vace: an image of what is to appear, or several: ["a.png", "b.png"]'
    references_file: Path | None = None
    "text file with one line of images for each prompt, as a.png, b.png"
    lora: Path | list[Path] | None = field(default=None, metadata={"repeated": True})
    "LoRA to put on the transformer, or several: --lora a --lora b; each a file or directory, of any format that mm-convert reads; of two experts on both, or a directory with a high_noise_model/ and a low_noise_model/, or high=a and low=b"  # noqa: E501
    lora_strength: Strength | list[Strength] = field(default=1.0, metadata={"repeated": True})
    "how strongly the LoRA acts: one number for all, or one for each in their order: --lora_strength 0.8 --lora_strength 1; 1 is as it was trained"  # noqa: E501
    lora_alpha: Annotated[float, "!= 0"] | None = None
    "alpha of the LoRA, where its files do not say it; of one LoRA alone"
    boundary: Boundary = None
    "of two experts: noise level from which on the first one works; by default what the directory says, or 0.9 for i2v, 0.875"  # noqa: E501
    offload: bool | None = None
    "of two experts, keep the idle one in the host's memory; by default on an accelerator"
    dtype: Literal["bfloat16", "float32"] | None = None
    "of transformer and text encoder; by default bfloat16 on an accelerator, float32 on a CPU, as VAE and CLIP always are"  # noqa: E501
    base: Base = "dtype"
    "in what the transformer's matrices are held: dtype, fp8 or int8 (a byte for each number), nf4 (half a byte); made while the weights are read, adapters stay beside them"  # noqa: E501
    host_layers: Annotated[int, ">= 0"] = 0
    "so many layers of the transformer have their matrices in the host's memory, and come one ahead"
    attention: AttentionName = "auto"
    "kernel of attention between tokens, where there are several: on CUDA flash, cudnn (H100, B200), flash3 or flash4 (with their packages), efficient; auto takes one by device, dtype and shapes, and the first line names it"  # noqa: E501
    text_tokens: Annotated[int, ">= 1", "<= 65536"] | None = None
    "rows of text that the model attends to; by default those it was trained with (512, or what the weights say)"
    vae_tiling: AskedTiling = None
    "encode and decode in tiles: less memory, faint seams; true, training: which tiles, where a model has several; default as the makers did, Wan false, Open-Sora-Plan true"  # noqa: E501
    compile: bool = False
    "compile each layer of the transformer: the first step takes longer, the others less"
    parallel: Ranks = field(default_factory=Ranks)
    deadline: Annotated[float, ">= 10", "<= 604800"] = 1800
    "on several ranks: seconds that a step of a video may take; then all end and say which rank hangs, and where"
    overwrite: bool = False
    "replace videos that are already in the output folder; without it, those that the same command made are kept"
    check: bool = False
    "look at everything that the command needs, print what is found, and make nothing; exit code 2 where something is wrong"  # noqa: E501

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.prompt is None) == (self.prompt_file is None):
            raise ValueError("give either --prompt or --prompt_file")
        for one in ("image", "video", "mask", "references"):
            if getattr(self, one) and getattr(self, f"{one}_file"):
                raise ValueError(f"give either --{one} or --{one}_file")
        if self.parallel.guidance == 2 and self.guidance is not None and max(self.scales) == 1:
            raise ValueError("parallel.guidance 2 shares two passes, but guidance 1 makes one: leave either out")
        read_loras(self.lora, self.lora_strength, self.lora_alpha)

    @property
    def patience(self) -> float:
        """Seconds that the rest may take: weights to read, what a video is made from to encode, a video to decode."""
        return 10 * self.deadline

    @property
    def options(self) -> Options:
        """How each of the videos is made."""
        return Options(**{field.name: getattr(self, field.name) for field in fields(Options)})
