"""What a Wan model is told besides noise and text, task by task: for training, validation and sampling alike.

t2v     nothing
i2v     condition: latents of [image, grey …]; with a CLIP branch also image, its CLIP tokens
flf2v   condition_both: latents of [first, grey …, last]; with a CLIP branch also image, the CLIP tokens of both
ti2v    first: latents of the image; they stand in the first latent frame, clean, at timestep 0
v2v     clean: latents of the video from which sampling begins; the model is told nothing
vace    control: latents of what is kept and of what changes; control_mask: which is which
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from mm_models.diffusion.flow import FlowMatching, expert_range
from mm_models.diffusion.objective import Diffusion, Pixels, pad_text
from mm_models.encoders.text import TextEncoder
from mm_models.wan.config import WanConfig
from mm_models.wan.tasks import CONDITION, MASK_SIDE, stored

Encode = Callable[[Tensor], Tensor]


class Conditioning:
    """An `mm_models.diffusion.objective.Conditioning`: the conditions of one task of one model."""

    def __init__(self, config: WanConfig, task: str) -> None:
        self.config, self.task = config, task
        self.always = {"latents": config.out_channels, "text": config.text_dim}
        self.text_tokens = config.text_tokens
        self.stored = stored(config, task)

    def encode(self, pixels: Pixels, encode: Encode, see: Encode | None = None) -> list[dict[str, Tensor]]:
        """The conditions of each video, without a batch dim. encode: pixels to latents; see: images to CLIP tokens."""
        match self.task:
            case "i2v" | "flf2v":
                images = (pixels.image, pixels.last_image) if self.task == "flf2v" else (pixels.image,)
                made = {CONDITION[self.task]: encode(condition_video(pixels.size[0], *images))}
                if self.config.image_dim is not None:
                    made["image"] = torch.cat([see(image) for image in images], dim=1)
            case "ti2v":
                made = {"first": encode(pixels.image[:, :, None])}
            case "v2v":
                made = {"clean": encode(pixels.video)}
            case "vace":
                return _encode_vace(pixels, encode)
            case _:
                return [{}]
        return [dict(zip(made, rows, strict=True)) for rows in zip(*made.values(), strict=True)]

    def find_misfit(self, names: Collection[str]) -> str:
        """Why features with conditions of these names are not for this task; empty where they are."""
        if "control" in names and self.task != "vace":
            return "was extracted for vace, where reference images stand before the latents"
        return ""

    def to_store(self, latents: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`latents` and the conditions of a sample. VACE's references stand before its latents, its mask is bytes."""
        if self.task != "vace":
            return {"latents": latents, **conditions}
        references = conditions["control"][: len(latents), : self.frames_before(conditions)]
        mask = (conditions["control_mask"] * 255).round().byte()
        return {"latents": torch.cat((references, latents), dim=1), **conditions, "control_mask": mask}

    def complete(self, latents: Tensor, conditions: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """With what clean latents B C F H W hold themselves: the first frame of ti2v."""
        return {**conditions, "first": latents[:, :, :1]} if self.task == "ti2v" else conditions

    def hold(self, latents: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """The latents with what is given in its place: for ti2v the clean first frame, else as they are."""
        if self.task != "ti2v":
            return latents
        return torch.cat((conditions["first"].to(latents), latents[:, :, 1:]), dim=2)

    def inputs(
        self,
        latents: Tensor,
        t: Tensor,
        text: Tensor,
        conditions: Mapping[str, Tensor],
        text_mask: Tensor | None = None,
        video_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The model's arguments, by name.

        Args:
            latents: B C F H W, noisy, with what is held.
            t: B, in 0..1000.
            text: B S D; it is padded as the model would, so that all batches have one shape.
            conditions: batched. control_mask: numbers in 0..1, or bytes in 0..255.
            text_mask: not used; a Wan attends to its padding, too, which is zero.
            video_mask: refused, as a Wan attends to all of a video.
        """
        if video_mask is not None:
            raise ValueError("a Wan has no mask of what is video: cut the clips to one size, with no padding")
        given = {"video": latents, "t": t, "text": pad_text(text, self.config.text_tokens)}
        match self.task:
            case "i2v" | "flf2v":
                mask = keep_mask(latents, last=self.task == "flf2v")
                given["video"] = torch.cat((latents, mask, conditions[CONDITION[self.task]].to(latents)), dim=1)
                if self.config.image_dim is not None:
                    given["image"] = conditions["image"]
            case "ti2v":
                given["t"] = first_frame_at_zero(t, latents.shape[2:], self.config.patch_size)
            case "vace":
                mask = conditions["control_mask"]
                mask = mask / 255 if mask.dtype == torch.uint8 else mask
                given["control"] = torch.cat((conditions["control"].to(latents), mask.to(latents)), dim=1)
        return given

    def learned(self, x: Tensor) -> Tensor:
        """The latent frames that a loss is taken over: for ti2v not the first, which is given and not predicted.

        (As DiffSynth does now. MindSpeed-MM 2.3 counts it with target 0, DiffSynth at the guides' commit noises it.)
        """
        return x[:, :, 1:] if self.task == "ti2v" else x

    def frames_before(self, conditions: Mapping[str, Tensor]) -> int:
        """VACE's reference frames, which stand before the video."""
        return references_in(conditions["control"]) if "control" in conditions else 0


def text_encoder(config: WanConfig, path: Path, device: torch.device | str, dtype: torch.dtype) -> TextEncoder:
    """UMT5, for as many rows as the model reads."""
    return TextEncoder(path, device, dtype, config.text_tokens)


def objective(
    config: WanConfig,
    task: str,
    *,
    expert: str | None = None,
    boundary: float | None = None,
    shift: float,
    range: tuple[float, float] | None,
    weighting: str,
    sampling: str,
    logit_mean: float,
    logit_std: float,
    shift_by: str,
    shift_tokens: int | None,
) -> Diffusion:
    """Flow matching for a task.

    expert, boundary: of two experts, which one, and the noise level at which their parts of the schedule meet.
    shift, …: see `FlowMatching`; without a range all of the schedule, or the expert's part of it.
    """
    flow = FlowMatching(
        shift,
        range or (expert_range(expert, boundary, shift) if expert else (0.0, 1.0)),
        weighting,
        sampling,
        (logit_mean, logit_std),
        shift_by,
        shift_tokens,
        prod(config.patch_size),
        (expert, boundary) if expert and not range else None,
    )
    return Diffusion(flow, Conditioning(config, task))


def _encode_vace(pixels: Pixels, encode: Encode) -> list[dict[str, Tensor]]:
    """References are kept clean, before the control. Without a source all is grey, and without a mask all changes."""
    frames, height, width = pixels.size
    given = pixels.video if pixels.video is not None else pixels.mask
    batch = len(given) if given is not None else max(1, len(pixels.references))
    source = torch.zeros(batch, 3, frames, height, width) if pixels.video is None else pixels.video
    mask = torch.ones(batch, 1, frames, height, width) if pixels.mask is None else pixels.mask
    control, folded = encode_control(encode, source, mask)
    conditions = []
    for number in range(batch):
        # one by one: in one video, the VAE would pack four of them into a latent frame
        images = pixels.references[number] if pixels.references else ()
        references = [encode(image[None, :, None]) for image in images]
        row = slice(number, number + 1)
        whole, whole_mask = with_references(control[row], folded[row], references)
        conditions.append({"control": whole[0], "control_mask": whole_mask[0]})
    return conditions


def keep_mask(latents: Tensor, last: bool = False) -> Tensor:
    """B 4 F H W, one where pixels are given: the first frame, and the last for flf2v.

    By pixel frames, four per latent frame; the first stands for the four of the first latent frame.
    """
    mask = latents.new_zeros((latents.shape[0], 4, *latents.shape[2:]))
    mask[:, :, 0] = 1
    if last:
        mask[:, 3, -1] = 1
    return mask


def first_frame_at_zero(t: Tensor, size: Sequence[int], patch: Sequence[int]) -> Tensor:
    """t B -> B L: 0 for the tokens of the first latent frame. `size` F H W of the latents."""
    frames, rows, columns = (n // p for n, p in zip(size, patch, strict=True))
    per_token = t[:, None].repeat(1, frames * rows * columns)
    per_token[:, : rows * columns] = 0
    return per_token


def condition_video(frames: int, first: Tensor, last: Tensor | None = None) -> Tensor:
    """What i2v and flf2v have encoded: B 3 F H W in [-1, 1], grey (0) but for the first frame, and the last if given.

    first, last: B 3 H W.
    """
    video = first.new_zeros((*first.shape[:2], frames, *first.shape[2:]))
    video[:, :, 0] = first
    if last is not None:
        video[:, :, -1] = last
    return video


def split_by_mask(video: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(what is kept, what changes) of a control video B 3 F H W in [-1, 1], for VACE: grey where it is the other's.

    mask: B 1 F H W in 0..1; above a half, pixels change.
    """
    changes = (mask > 0.5).to(video)
    return video * (1 - changes), video * changes


def fold_mask(mask: Tensor, frames: int) -> Tensor:
    """VACE's mask by latents: B 1 F H W -> B 64 F' H/8 W/8 (channel = 8 · row + column of the pixel in its square).

    `frames` is F'. A latent frame takes the pixel frame nearest to its middle, not the group of four that the VAE packs
    into it: so the released weights were trained.
    """
    folded = rearrange(mask, "b 1 f (h p) (w q) -> b (p q) f h w", p=MASK_SIDE, q=MASK_SIDE)
    chosen = [(2 * k + 1) * mask.shape[2] // (2 * frames) for k in range(frames)]
    return folded[:, :, chosen]


def encode_control(encode: Callable[[Tensor], Tensor], source: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """VACE's (control B 2C F' h w, control_mask B 64 F' h w) of a source B 3 F H W and a mask B 1 F H W in 0..1.

    encode: pixels to latents, as `Codec.encode`. The mask halves the videos at 0.5, but is folded as it is: so VACE
    was trained.
    """
    control = torch.cat([encode(part) for part in split_by_mask(source, mask)], dim=1)
    return control, fold_mask(mask, control.shape[2]).to(control)


def references_in(control: Tensor) -> int:
    """How many reference frames stand before a control (… 2C F H W): those in which nothing changes, exactly."""
    frames = control.narrow(-4, control.shape[-4] // 2, control.shape[-4] // 2).movedim(-3, 0).flatten(1)
    return int(frames.eq(0).all(1).cumprod(0).sum())


def with_references(control: Tensor, control_mask: Tensor, references: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """VACE's control with reference images before it, one latent frame each, in the order given.

    control B 2C F H W; control_mask B 64 F H W; references B C 1 H W each. A reference is kept (its latents stand in
    the first half of the channels), and nothing of it changes (mask 0).
    """
    if not references:
        return control, control_mask
    before = torch.cat(list(references), dim=2)
    kept = torch.cat((before, torch.zeros_like(before)), dim=1)
    empty = control_mask.new_zeros((*control_mask.shape[:2], len(references), *control_mask.shape[3:]))
    return torch.cat((kept, control), dim=2), torch.cat((empty, control_mask), dim=2)
