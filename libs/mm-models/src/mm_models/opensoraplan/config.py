"""The shape of an Open-Sora-Plan model."""

from dataclasses import dataclass
from typing import Annotated, Literal

Size = Annotated[int, ">= 1", "<= 1048576"]
Scale = Annotated[float, "> 0", "<= 1024"]


@dataclass(frozen=True)
class OpenSoraPlanConfig:
    """Architecture of `OpenSoraT2V`; the defaults are Open-Sora-Plan 1.2."""

    dim: Size = 2304
    ffn_dim: Size = 9216
    num_heads: Size = 24
    num_layers: Annotated[int, ">= 1", "<= 1024"] = 32
    freq_dim: Size = 256
    """Width of the sinusoidal timestep embedding."""
    text_dim: Size = 4096
    text_tokens: Size = 512
    """Rows of text that it was trained with, the padding among them. Padding is never attended to."""
    in_channels: Size = 4
    out_channels: Size = 4
    patch_size: tuple[Size, Size, Size] = (1, 2, 2)
    """Latent frames, rows and columns per token; as many rows as columns, and one frame."""
    eps: Annotated[float, "> 0", "< 1"] = 1e-6
    interpolation_scale: tuple[Scale, Scale, Scale] = (1.0, 1.0, 1.0)
    """Frames, rows, columns: the position of a token is its index divided by this number."""
    sample_size: tuple[Size, Size, Size] | None = None
    """Latent frames, rows and columns that it was trained on. None: it is not known, or there is no such size."""
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    """What it predicts: the noise, or the velocity."""

    def __post_init__(self) -> None:
        for name in ("patch_size", "interpolation_scale", "sample_size"):  # JSON and TOML have lists only
            value = getattr(self, name)
            if value is None and name == "sample_size":
                continue
            if not isinstance(value, tuple | list) or len(value) != 3:
                raise ValueError(f"{name} is {value}, but must be three numbers: frames, rows, columns")
            object.__setattr__(self, name, tuple(value))
        for name, scale in (("eps", self.eps), *(("interpolation_scale", s) for s in self.interpolation_scale)):
            if type(scale) not in (int, float) or not 0 < scale < (1 if name == "eps" else float("inf")):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but must be above 0" + " and below 1" * (name == "eps")
                )
        object.__setattr__(self, "interpolation_scale", tuple(float(scale) for scale in self.interpolation_scale))
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type is {self.prediction_type!r}, but must be epsilon or v_prediction")
        others = ("patch_size", "eps", "interpolation_scale", "sample_size", "prediction_type")
        sizes = {name: size for name, size in vars(self).items() if name not in others}
        for name in ("patch_size", "sample_size"):
            sizes |= {f"{name}[{i}]": size for i, size in enumerate(getattr(self, name) or ())}
        for name, size in sizes.items():
            if type(size) is not int or size < 1:
                raise ValueError(f"{name} is {size!r}, but must be a whole number of at least 1")
        if self.patch_size[0] != 1 or self.patch_size[1] != self.patch_size[2]:
            raise ValueError(f"patch_size is {self.patch_size}, but must be one frame, and as many rows as columns")
        if self.dim % self.num_heads or self.head_dim % 6:
            raise ValueError(
                f"dim {self.dim} over {self.num_heads} heads: the quotient must be a whole multiple of 6, because "
                "rotary positions turn pairs of channels in three equal bands"
            )
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim is {self.freq_dim}, but must be even: half cosines, half sines")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads
