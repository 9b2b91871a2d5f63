"""What can be asked for: the same names as flags of the command line and as arguments of a Sampler."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

# The English negative prompt of the Wan2.1 guides; the official Chinese one says the same.
NEGATIVE_PROMPT = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, "
    "overall gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn "
    "hands, poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy background, "
    "three legs, many people in the background, walking backwards"
)


@dataclass(kw_only=True)
class Options:
    """How one video is made from one prompt."""

    negative_prompt: str = NEGATIVE_PROMPT
    "what to stay away from; not used with guidance 1 (default: the list of the Wan2.1 guides)"
    height: int = 480
    "pixels, a multiple of 16"
    width: int = 832
    "pixels, a multiple of 16"
    frames: int = 81
    "4k+1 frames"
    steps: int = 50
    "denoising steps; each runs the model twice, or once with guidance 1"
    guidance: float = 5.0
    "weight of the prompt against the negative prompt; 1 leaves the negative prompt out"
    flow_shift: float | None = None
    "bends the steps towards noise; by default 3.0 for 480p and 5.0 for 720p, whichever height x width is nearer to"
    sampler: Literal["unipc", "euler"] = "unipc"
    "solver"
    grid: Literal["guides", "diffusers"] = "guides"
    "noise levels of the steps: as in the guides and diffusers before 0.37, or as in later diffusers"
    seed: int = 0
    "of the initial noise, the same for every prompt"

    def __post_init__(self) -> None:
        if self.frames < 1 or self.frames % 4 != 1:
            raise ValueError(
                f"frames {self.frames}: the VAE turns 4k+1 frames into k+1, so ask for {_neighbours(self.frames, 1, 4)}"
            )
        for side in ("height", "width"):
            size = getattr(self, side)
            if size < 16 or size % 16:
                raise ValueError(
                    f"{side} {size}: the VAE divides it by 8 and the model by 2, so it must be a multiple of 16, "
                    f"as {_neighbours(size, 16, 16)}"
                )
        if self.steps < 1:
            raise ValueError(f"steps {self.steps}: at least one step is needed")
        if not self.guidance >= 1:
            raise ValueError(f"guidance {self.guidance}: must be 1 (no guidance) or more")
        if self.flow_shift is None:
            # Midway between the two areas that the guides name, so that every size has an answer.
            self.flow_shift = 3.0 if self.height * self.width < (480 * 832 + 720 * 1280) / 2 else 5.0
        if not self.flow_shift > 0:
            raise ValueError(f"flow_shift {self.flow_shift}: must be more than 0 (1 bends nothing)")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed}: must be from 0 to 2^63-1")


def _neighbours(value: int, first: int, step: int) -> str:
    """The values of first, first + step, ... around `value`."""
    below = first + (value - first) // step * step
    return f"{below} or {below + step}" if below >= first else str(first)


@dataclass(frozen=True)
class Ranks:
    """How many of torchrun's ranks make one video together; what is left of them makes others."""

    cp: int | None = None
    "ranks that share the tokens of a video: Ulysses, or ulysses x ring"
    ulysses: int | None = None
    "of these, ranks that exchange tokens for heads"
    ring: int | None = None
    "of these, ranks that pass keys and values around"
    guidance: Literal[1, 2] = 1
    "2: the passes with the prompt and with the negative prompt run at the same time, on ranks of their own"


@dataclass(kw_only=True)
class Config(Options):
    """Generate videos from text. Under torchrun, ranks share the prompts, or the work on each (see parallel)."""

    weights: Path
    "a diffusers directory (transformer, vae, text_encoder, tokenizer), or the transformer alone: converted or original"
    output: Path
    "folder for video_0.mp4, video_1.mp4, ...; made if it is missing"
    model: str | None = None
    "preset, as wan2.1-t2v-1.3b; only needed where the weights do not say what they are"
    encoders: Path | None = None
    "diffusers directory of the vae, text_encoder and tokenizer, where the weights hold only the transformer"
    prompt: str | None = None
    "what to show"
    prompt_file: Path | None = None
    "text file with one prompt per line; empty lines are left out"
    lora: Path | None = None
    "LoRA to put on the transformer: a file or directory written by mm_train"
    dtype: Literal["bfloat16", "float32"] | None = None
    "of transformer and text encoder; by default bfloat16 on an accelerator, float32 on a CPU, as the VAE always is"
    text_tokens: int | None = None
    "rows of text that the model attends to; by default those it was trained with (512, or what the weights say)"
    vae_tiling: bool = False
    "decode in tiles: less memory, faint seams"
    fps: int = 16
    "frames per second of the mp4"
    parallel: Ranks = field(default_factory=Ranks)
    overwrite: bool = False
    "replace videos that are already in the output folder; without it, those that the same command made are kept"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.prompt is None) == (self.prompt_file is None):
            raise ValueError("give either --prompt or --prompt_file")
        if self.fps < 1:
            raise ValueError(f"fps {self.fps}: must be 1 or more")
        if self.parallel.guidance == 2 and self.guidance == 1:
            raise ValueError("parallel.guidance 2 shares two passes, but guidance 1 makes one: leave either out")

    def prompts(self) -> list[str]:
        """The prompts asked for, in order. OSError for a file that cannot be read, ValueError for one that is
        empty or no UTF-8 text.
        """
        if self.prompt is not None:
            return [self.prompt]
        try:
            text = self.prompt_file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            why = f"{error.reason} at byte {error.start}"
            raise ValueError(f"{self.prompt_file} is not UTF-8 text ({why}): save it as UTF-8") from error
        # Not splitlines, which would also cut at U+2028 and U+0085, inside what an editor shows as one line.
        prompts = [line.strip() for line in text.split("\n") if line.strip()]
        if not prompts:
            raise ValueError(f"{self.prompt_file} holds no prompts: it should have one per line")
        return prompts
