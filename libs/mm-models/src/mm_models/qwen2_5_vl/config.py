"""The shape of a Qwen2.5-VL model."""

from dataclasses import dataclass, fields
from typing import Annotated

Size = Annotated[int, ">= 1", "<= 1048576"]
Count = Annotated[int, ">= 1", "<= 1024"]
Token = Annotated[int, ">= 0", "<= 16777216"]


@dataclass(frozen=True)
class Qwen25VLConfig:
    """Architecture of Qwen2.5-VL, a vision tower and a language model; the defaults are those of 7B."""

    dim: Size = 3584
    ffn_dim: Size = 18944
    num_layers: Count = 28
    num_heads: Size = 28
    num_kv_heads: Size = 4
    """Heads of keys and values; each serves as many heads of queries."""
    vocab_size: Annotated[int, ">= 2", "<= 16777216"] = 152064
    tied: bool = False
    """Whether the head multiplies by the embedding of the tokens, and has no matrix of its own."""
    eps: Annotated[float, "> 0", "< 1"] = 1e-6
    rope_theta: Annotated[float, ">= 2", "<= 1000000000000"] = 1e6
    mrope_section: tuple[Size, Size, Size] = (16, 24, 24)
    """Pairs of channels of a head that turn with the time, the row and the column of a token."""
    max_positions: Annotated[int, ">= 1", "<= 1073741824"] = 128000
    """How long a sequence may be, as published. Nothing here depends on it."""

    image_token: Token = 151655
    """A token in whose place a feature of an image is put."""
    video_token: Token = 151656
    vision_start_token: Token = 151652
    vision_end_token: Token = 151653
    bos_token: Token = 151643
    eos_token: Token = 151645
    """It ends every turn."""

    vision_dim: Size = 1280
    vision_ffn_dim: Size = 3420
    vision_layers: Count = 32
    vision_heads: Size = 16
    channels: Size = 3
    patch_size: Size = 14
    """Rows and columns of pixels of a patch."""
    temporal_patch_size: Size = 2
    """Frames of a patch; an image is doubled."""
    spatial_merge_size: Size = 2
    """Rows and columns of patches that become one token of the language model."""
    window_size: Size = 112
    """Rows and columns of pixels within which most layers of the tower attend."""
    full_attention_layers: tuple[Annotated[int, ">= 0"], ...] = (7, 15, 23, 31)
    """Layers of the tower that attend to the whole frame; the first is 0."""
    tokens_per_second: Annotated[float, "> 0", "<= 1000"] = 2
    """Positions that a second of a video is long."""

    def __post_init__(self) -> None:
        for name in ("mrope_section", "full_attention_layers"):  # JSON and TOML have lists only
            value = getattr(self, name)
            if not isinstance(value, tuple | list) or not all(type(number) is int for number in value):
                raise ValueError(f"{name} is {value!r}, but must be whole numbers")
            object.__setattr__(self, name, tuple(value))
        if type(self.tied) is not bool:
            raise ValueError(f"tied is {self.tied!r}, but must be true or false")
        for name, least, most in (("eps", 0, 1), ("rope_theta", 1.99, 1e12), ("tokens_per_second", 0, 1000.1)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not least < value < most:
                raise ValueError(f"{name} is {value!r}, but must be a number above {least:g} and below {most:g}")
        self._check_counts()
        self._check_tokens()
        self._check_heads()
        if sorted({*self.full_attention_layers} & {*range(self.vision_layers)}) != list(self.full_attention_layers):
            raise ValueError(
                f"full_attention_layers are {self.full_attention_layers}, but must be layers of the tower "
                f"(0 … {self.vision_layers - 1}), each larger than the one before"
            )
        side = self.patch_size * self.spatial_merge_size
        if self.window_size % side:
            raise ValueError(
                f"window_size is {self.window_size}, but must be a multiple of {side}, the pixels that become one "
                f"token: {self.spatial_merge_size} patches of {self.patch_size}"
            )

    def _check_counts(self) -> None:
        others = ("tied", "eps", "rope_theta", "tokens_per_second", "mrope_section", "full_attention_layers")
        names = (field.name for field in fields(self) if field.name not in others)
        sizes = {name: (getattr(self, name), int(not name.endswith("_token"))) for name in names}
        sizes |= {f"mrope_section[{i}]": (size, 1) for i, size in enumerate(self.mrope_section)}
        for name, (size, least) in sizes.items():
            if type(size) is not int or size < least:
                raise ValueError(f"{name} is {size!r}, but must be a whole number of at least {least}")

    def _check_tokens(self) -> None:
        for field in fields(self):
            token = getattr(self, field.name)
            if field.name.endswith("_token") and token >= self.vocab_size:
                raise ValueError(f"{field.name} is {token}, but the vocabulary ends at {self.vocab_size - 1}")
        if self.image_token == self.video_token:
            raise ValueError(f"image_token and video_token are both {self.image_token}, but must differ")

    def _check_heads(self) -> None:
        if self.dim % self.num_heads or self.head_dim % 2:
            raise ValueError(
                f"dim {self.dim} over {self.num_heads} heads: the quotient must be an even whole number, because "
                "rotary positions turn pairs of channels"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads is {self.num_kv_heads}, but must divide num_heads, {self.num_heads}: each head of keys "
                "and values serves as many heads of queries"
            )
        if len(self.mrope_section) != 3 or sum(self.mrope_section) != self.head_dim // 2:
            raise ValueError(
                f"mrope_section is {self.mrope_section}, but must be three numbers whose sum is {self.head_dim // 2}: "
                f"half the {self.head_dim} channels of a head"
            )
        if self.vision_dim % self.vision_heads or self.vision_head_dim % 4:
            raise ValueError(
                f"vision_dim {self.vision_dim} over {self.vision_heads} heads: the quotient must be a multiple of 4, "
                "because one half of the pairs of channels turns with the row, the other with the column"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def vision_head_dim(self) -> int:
        return self.vision_dim // self.vision_heads

    @property
    def patch_dim(self) -> int:
        """Numbers of a patch: channels x frames x rows x columns of pixels."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merged(self) -> int:
        """Patches that become one token."""
        return self.spatial_merge_size**2

    @property
    def window(self) -> int:
        """Rows and columns of tokens of a window."""
        return self.window_size // self.patch_size // self.spatial_merge_size
