"""Tiny VAEs, text and image encoders and a tokenizer with random weights, in the real classes and files: to test with,
here and elsewhere.
"""

from pathlib import Path
from typing import Any, Literal

import torch

from mm_models.testing import byte_tokenizer

Kind = Literal["wan2.1", "wan2.2"]


def tiny_encoders(
    text_dim: int = 32, seed: int = 0, *, image_dim: int | None = None, vae: Kind = "wan2.1"
) -> dict[str, Any]:
    """The parts of a Wan pipeline besides its transformer and scheduler, by the names that diffusers gives them.

    `tokenizer`; `text_encoder`, text_dim wide; `vae`, of Wan2.1 (16 channels, 4x8x8) or Wan2.2 (48 channels, 4x16x16);
    with `image_dim` also `image_encoder`, a CLIP of that width with 257 tokens, and `image_processor`, which squashes.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    video = _vae(vae)
    text = UMT5Config(vocab_size=259, d_model=text_dim, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0)
    parts = {"tokenizer": byte_tokenizer(), "text_encoder": UMT5EncoderModel(text).eval(), "vae": video.eval()}
    return parts | (_clip(image_dim) if image_dim else {})


def write_encoders(
    path: Path | str, text_dim: int = 32, seed: int = 0, *, image_dim: int | None = None, vae: Kind = "wan2.1"
) -> Path:
    """The same as a diffusers directory: vae/, text_encoder/, tokenizer/ (image_encoder/, image_processor/)."""
    for name, part in tiny_encoders(text_dim, seed, image_dim=image_dim, vae=vae).items():
        part.save_pretrained(Path(path) / name)
    return Path(path)


def _vae(kind: Kind):
    from diffusers import AutoencoderKLWan

    small = {"base_dim": 4, "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
    if kind == "wan2.1":
        return AutoencoderKLWan(z_dim=16, dim_mult=[1, 1, 1, 1], **small)
    return AutoencoderKLWan(
        decoder_base_dim=8,
        z_dim=48,
        dim_mult=[1, 2, 2, 2],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=16,
        latents_mean=torch.linspace(-0.3, 0.5, 48).tolist(),
        latents_std=torch.linspace(0.4, 1.6, 48).tolist(),
        **small,
    )


def _clip(dim: int) -> dict[str, Any]:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    side = 32  # of patches of 2 pixels: 256, and one token for the whole
    shape = {"hidden_size": dim, "intermediate_size": 2 * dim, "num_attention_heads": 2, "num_hidden_layers": 3}
    config = CLIPVisionConfig(**shape, image_size=side, patch_size=2, projection_dim=dim, hidden_act="gelu")
    processor = CLIPImageProcessor(do_center_crop=False, size={"height": side, "width": side})
    return {"image_encoder": CLIPVisionModel(config).eval(), "image_processor": processor}
