"""The shape of a Wan model."""

from dataclasses import dataclass
from typing import Annotated

Size = Annotated[int, ">= 1", "<= 1048576"]

CLIP_TOKENS = 257  # that Wan's CLIP makes of one image: 16 x 16 patches, and one for the whole


@dataclass(frozen=True)
class WanConfig:
    """Architecture of a Wan transformer; the defaults are Wan2.1-T2V-14B."""

    dim: Size = 5120
    ffn_dim: Size = 13824
    num_heads: Size = 40
    num_layers: Annotated[int, ">= 1", "<= 1024"] = 40
    freq_dim: Size = 256
    """Width of the sinusoidal timestep embedding."""
    text_dim: Size = 4096
    text_tokens: Size = 512
    """Rows of text that are attended to, always: shorter prompts are zero-padded. 512 in everything released."""
    in_channels: Size = 16
    """16, or 36 for image-to-video: noisy latents 16, mask 4, latents of the condition 16."""
    out_channels: Size = 16
    patch_size: tuple[Size, Size, Size] = (1, 2, 2)
    """Latent frames, rows and columns per token."""
    eps: Annotated[float, "> 0", "< 1"] = 1e-6
    image_dim: Size | None = None
    """Width of the CLIP features; None leaves the CLIP branch out."""
    image_tokens: Size = CLIP_TOKENS
    """CLIP tokens: of Wan's CLIP 257 for one image, 514 for two (first and last frame)."""
    image_positions: bool | None = None
    """Whether each CLIP token has a learned position, which says whose it is of a first and a last image.

    None: where there are more of them than Wan's CLIP makes of one image.
    """
    image_kv: bool = True
    """Whether the image has keys and values of its own in every layer, as in everything released. Otherwise image and
    text are attended to together.
    """
    vace_layers: tuple[Annotated[int, ">= 0"], ...] = ()
    """Layers that a block of the control ladder feeds (VACE); the first is 0. Empty: there is no such ladder."""
    control_channels: Size = 96
    """Channels of the control video: latents of what is kept 16 and of what changes 16, mask 64. Only with VACE."""

    def __post_init__(self) -> None:
        if not isinstance(self.patch_size, tuple | list) or len(self.patch_size) != 3:
            raise ValueError(f"patch_size is {self.patch_size}, but must be three numbers: frames, rows, columns")
        if not isinstance(self.vace_layers, tuple | list) or not all(type(n) is int for n in self.vace_layers):
            raise ValueError(f"vace_layers is {self.vace_layers!r}, but must be numbers of layers")
        if type(self.eps) not in (int, float) or not 0 < self.eps < 1:
            raise ValueError(f"eps is {self.eps!r}, but must be a number between 0 and 1")
        if type(self.image_kv) is not bool or type(self.image_positions) not in (bool, type(None)):
            name = "image_positions" if type(self.image_kv) is bool else "image_kv"
            raise ValueError(f"{name} is {getattr(self, name)!r}, but must be true or false")
        object.__setattr__(self, "patch_size", tuple(self.patch_size))  # JSON and TOML have lists only
        object.__setattr__(self, "vace_layers", tuple(self.vace_layers))
        others = ("patch_size", "eps", "image_dim", "image_positions", "image_kv", "vace_layers")
        sizes = {name: size for name, size in vars(self).items() if name not in others}
        sizes |= {f"patch_size[{i}]": size for i, size in enumerate(self.patch_size)}
        sizes |= {} if self.image_dim is None else {"image_dim": self.image_dim}
        for name, size in sizes.items():
            if type(size) is not int or size < 1:
                raise ValueError(f"{name} is {size!r}, but must be a whole number of at least 1")
        if self.dim % self.num_heads or self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(
                f"dim {self.dim} over {self.num_heads} heads: the quotient must be an even whole number of at least 6, "
                "because rotary positions turn pairs of channels in three bands"
            )
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim is {self.freq_dim}, but must be even: half cosines, half sines")
        fed = self.vace_layers
        if fed and (fed[0] != 0 or sorted(set(fed)) != list(fed) or fed[-1] >= self.num_layers):
            raise ValueError(
                f"vace_layers are {fed}, but must be numbers of layers (0 … {self.num_layers - 1}), each larger than "
                "the one before, and the first 0: the control ladder begins with the tokens that enter the first layer"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def two_images(self) -> bool:
        """Whether it sees a first and a last image, and has a position for each of their tokens."""
        if self.image_positions is not None:
            return self.image_positions
        return self.image_tokens > CLIP_TOKENS
