"""What may lie in vae/ of Open-Sora-Plan 1.2, and the shape that it says the VAE has. Known without torch.

config.json + checkpoint.ckpt                       as the model's makers publish it
config.json + diffusion_pytorch_model.safetensors   as `mm-convert convert --to original` writes it
config.json + model.safetensors(.index.json)        as `mm-convert convert` writes it in our own layout
casualvae_mm.pt                                     as MindSpeed-MM's `vae_convert` writes it, or mm-convert; beside it
                                                    may lie a config.json, or what mm-convert notes of it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from mm_models.folder import check_files, check_weights, read_json

Size = Annotated[int, ">= 1", "<= 65536"]

CHANNELS = 4  # of the latents
STRIDE = (4, 8, 8)  # frames, rows and columns of pixels per latent
GROUPS = 32  # of the norms
PUBLISHED, OLDER = "AttnBlock3DFix", "AttnBlock3D"

_PICKLES = ("checkpoint.ckpt", "casualvae_mm.pt")
_OTHER_WEIGHTS = (".safetensors", ".safetensors.index.json", ".ckpt", ".pt", ".pth", ".bin", ".pkl")
_LET = "only the VAE of Open-Sora-Plan 1.2 is known: take its folder as the model's makers publish it"
_WITHOUT = ["", "", "", ""]
_BLOCKS = {  # what the published config.json says of its blocks, besides their attention
    "q_conv": "CausalConv3d",
    "encoder_conv_in": "Conv2d",
    "encoder_conv_out": "CausalConv3d",
    "encoder_resnet_blocks": ["ResnetBlock2D", "ResnetBlock2D", "ResnetBlock3D", "ResnetBlock3D"],
    "encoder_mid_resnet": "ResnetBlock3D",
    "encoder_spatial_downsample": [
        "Downsample",
        "Spatial2xTime2x3DDownsample",
        "Spatial2xTime2x3DDownsample",
        "",
    ],
    "encoder_temporal_downsample": _WITHOUT,
    "decoder_conv_in": "CausalConv3d",
    "decoder_conv_out": "CausalConv3d",
    "decoder_resnet_blocks": ["ResnetBlock3D"] * 4,
    "decoder_mid_resnet": "ResnetBlock3D",
    "decoder_spatial_upsample": [
        "",
        "SpatialUpsample2x",
        "Spatial2xTime2x3DUpsample",
        "Spatial2xTime2x3DUpsample",
    ],
    "decoder_temporal_upsample": _WITHOUT,
}
_USUAL = {"attn_resolutions": [], "double_z": True, "use_quant_layer": True, "norm_type": "groupnorm"}  # if not said


@dataclass(frozen=True)
class VAEConfig:
    """Widths of the VAE; the defaults are those of the released one (239,189,991 parameters)."""

    hidden_size: Size = 128
    """Channels of the first level."""
    hidden_size_mult: tuple[Size, Size, Size, Size] = (1, 2, 4, 4)
    """Channels of each level, times hidden_size."""
    num_res_blocks: Annotated[int, ">= 1", "<= 64"] = 2
    """Of each level of the encoder; the decoder has one more."""
    z_channels: Size = 4
    embed_dim: Size = CHANNELS
    """Channels of the latents."""
    attention: Literal["AttnBlock3DFix", "AttnBlock3D"] = PUBLISHED
    """AttnBlock3D, of the makers' older VAEs, takes channels and frames for one another: 17 % other latents at 9
    frames. Weights go with the one that they were trained with.
    """

    def __post_init__(self) -> None:
        counts = ("hidden_size", "num_res_blocks", "z_channels", "embed_dim")
        for name, value in [(name, getattr(self, name)) for name in counts]:
            if type(value) is not int or not 1 <= value <= (64 if name == "num_res_blocks" else 65536):
                raise ValueError(f"{name} is {value!r}, and must be a positive integer")
        factors = self.hidden_size_mult
        if not isinstance(factors, tuple | list) or [type(n) for n in factors] != [int] * 4 or min(factors) < 1:
            raise ValueError(f"hidden_size_mult is {factors!r}, and must be four positive integers")
        object.__setattr__(self, "hidden_size_mult", tuple(factors))  # JSON has lists only
        if self.attention not in (PUBLISHED, OLDER):
            raise ValueError(f"attention is {self.attention!r}, and must be {PUBLISHED} or {OLDER}")
        if wrong := [width for width in self.widths if width % GROUPS or width > 65536]:
            raise ValueError(f"{wrong[0]} channels: must be a multiple of {GROUPS}, and at most 65536")

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [self.hidden_size * factor for factor in self.hidden_size_mult]


def describe(config: VAEConfig) -> dict[str, Any]:
    """The config.json of such a VAE, as its makers write it."""
    return {
        "_class_name": "CausalVAEModel",
        "hidden_size": config.hidden_size,
        "hidden_size_mult": list(config.hidden_size_mult),
        "num_res_blocks": config.num_res_blocks,
        "z_channels": config.z_channels,
        "embed_dim": config.embed_dim,
        "dropout": 0.0,
        "resolution": 256,
        "attn_resolutions": [],
        "double_z": True,
        "encoder_attention": config.attention,
        "decoder_attention": config.attention,
        **_BLOCKS,
    }


def check_folder(folder: Path) -> Path:
    """The file of weights of a vae/, or of several their index.

    Raises ValueError unless there is one and all else is as it should be; no pickle is opened.
    """
    check_files(folder)
    read_config(folder)
    lies = sorted(file.name for file in folder.iterdir() if file.name.endswith(_OTHER_WEIGHTS))
    pickles = [name for name in lies if name in _PICKLES]
    if not pickles and any(".safetensors" in name for name in lies):
        check_weights(folder)
        return next(
            (folder / name for name in lies if name.endswith(".index.json")),
            folder / next(name for name in lies if name.endswith(".safetensors")),
        )
    if len(pickles) != 1 or len(lies) != 1:
        has = f"it has {', '.join(lies[:5])}" if lies else "it has none"
        raise ValueError(
            f"{folder} should hold one set of weights, and {has}: checkpoint.ckpt as published, or what `mm-convert` "
            "made of it (safetensors, or casualvae_mm.pt); move away what is not meant"
        )
    return folder / pickles[0]


def read_config(folder: Path) -> VAEConfig:
    """What config.json says, or beside casualvae_mm.pt mm-convert's note; the published shape where there is neither.

    Raises ValueError for a VAE of other blocks, naming what differs.
    """
    file, note = folder / "config.json", folder / "casualvae_mm.pt.mm_convert.json"
    if not file.exists() and (folder / "casualvae_mm.pt").exists():
        if not note.exists():
            return VAEConfig()
        file = note
    said = read_json(file)
    try:
        return _from_ours(said) if file == note or said.get("format") == "mm" else _from_published(said)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _from_published(said: Mapping[str, Any]) -> VAEConfig:
    if said.get("_class_name", "CausalVAEModel") != "CausalVAEModel":
        raise ValueError(f"_class_name is {said['_class_name']!r}, and must be 'CausalVAEModel': {_LET}")
    for key, published in {**_USUAL, **_BLOCKS}.items():
        if said.get(key, _USUAL.get(key)) != published:
            raise ValueError(f"{key} is {said.get(key)!r}, and must be {published!r}: {_LET}")
    kinds = said.get("encoder_attention"), said.get("decoder_attention")
    if kinds not in ((PUBLISHED, PUBLISHED), (OLDER, OLDER)):
        raise ValueError(
            f"encoder_attention and decoder_attention are {kinds[0]!r} and {kinds[1]!r}, and must both be "
            f"{PUBLISHED!r}, or both {OLDER!r}: {_LET}"
        )
    names = ("hidden_size", "hidden_size_mult", "num_res_blocks", "z_channels", "embed_dim")
    if missing := [name for name in names if name not in said]:
        raise ValueError(f"{missing[0]} is missing: {_LET}")
    return VAEConfig(**{name: said[name] for name in names}, attention=kinds[0])


def _from_ours(said: Mapping[str, Any]) -> VAEConfig:
    """As mm-convert writes it: what is not the published shape stands there."""
    config = said.get("config")
    if said.get("family") != "opensoraplan-vae" or not isinstance(config, dict):
        raise ValueError(f"it describes {said.get('family')!r}: {_LET}")
    ours = {"base_dim": "hidden_size", "z_channels": "z_channels", "embed_dim": "embed_dim", "attention": "attention"}
    if wrong := [name for name in config if name not in (*ours, "channels")]:
        raise ValueError(f"{wrong[0]} is not known: {_LET}")
    if config.get("channels", 3) != 3:
        raise ValueError(f"channels is {config['channels']!r}, and must be 3: {_LET}")
    return VAEConfig(**{ours[name]: value for name, value in config.items() if name in ours})
