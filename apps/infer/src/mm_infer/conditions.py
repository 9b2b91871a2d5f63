"""What a video is made from, as the model's conditions: the same as training stores, from pixels of ours."""

from collections.abc import Callable

import torch
from mm_models.wan.conditions import CONDITION, condition_video, encoded_control, with_references
from torch import Tensor

from mm_data.images import crop_to, pad_to
from mm_infer.config import Options
from mm_infer.inputs import Given, footage, mask_pixels, picture
from mm_models.encoders import VideoVAE
from mm_models.wan import WanConfig


def images(given: Given, options: Options) -> list[Tensor]:
    """The first frame, and the last for flf2v: 1 3 H W in [-1, 1] each."""
    size = options.height, options.width
    wanted = (given.image, given.last_image) if options.task == "flf2v" else (given.image,)
    return [crop_to(picture(one), size)[None] for one in wanted]


def conditions(
    config: WanConfig, given: Given, options: Options, vae: VideoVAE, see: Callable[[list[Tensor], bool], list[Tensor]]
) -> dict[str, Tensor]:
    """See `mm_models.wan.conditions`; for one video, with a dimension of 1 in front.

    see: images 1 3 H W, and whether CLIP sees their middle only, to their CLIP tokens 1 S D.
    """
    if options.task in ("i2v", "flf2v"):
        frames = images(given, options)
        made = {CONDITION[options.task]: vae.encode(condition_video(options.frames, *frames))}
        return made | ({"image": torch.cat(see(frames, options.clip_crop), dim=1)} if config.image_dim else {})
    if options.task == "ti2v":
        (first,) = images(given, options)
        return {"first": vae.encode(first[:, :, None])}
    if options.task == "v2v":
        return {"video": vae.encode(_source(given, options)[None])}
    return _control(given, options, vae) if options.task == "vace" else {}


def _source(given: Given, options: Options) -> Tensor:
    """3 F H W in [-1, 1]."""
    return footage(given.video, options.fps).cut(options.frames).pixels((options.height, options.width))


def _control(given: Given, options: Options, vae: VideoVAE) -> dict[str, Tensor]:
    """VACE's. Without a video all is grey, and without a mask all of it changes."""
    size = options.height, options.width
    video = torch.zeros(3, options.frames, *size) if given.video is None else _source(given, options)
    mask = torch.ones(1, options.frames, *size)
    if given.mask is not None:
        mask = mask_pixels(given, options.fps, options.frames, size)
    control, folded = encoded_control(vae.encode, video[None], mask[None])
    # One by one: in one video, the VAE would pack four of them into a latent frame.
    references = [vae.encode(pad_to(picture(one), size)[None, :, None]) for one in given.references]
    control, folded = with_references(control, folded, references)
    return {"control": control, "control_mask": folded}
