"""The shape of a Wan model, and what one forward pass of it costs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class WanConfig:
    """Architecture of a Wan transformer; the defaults are Wan2.1-T2V-14B."""

    dim: int = 5120
    ffn_dim: int = 13824
    num_heads: int = 40
    num_layers: int = 40
    freq_dim: int = 256
    """Width of the sinusoidal timestep embedding."""
    text_dim: int = 4096
    text_tokens: int = 512
    """Rows of text that are attended to, always: shorter prompts are zero-padded. 512 in everything released."""
    in_channels: int = 16
    """16, or 36 for image-to-video: noisy latents 16, mask 4, latents of the condition 16."""
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    """Latent frames, rows and columns per token."""
    eps: float = 1e-6
    image_dim: int | None = None
    """Width of the CLIP features; None leaves the CLIP branch out."""
    image_tokens: int = 257
    """CLIP tokens: of Wan's CLIP 257 for one image, 514 for two (first and last frame). More than 257 also get a
    learned position."""
    image_kv: bool = True
    """Whether the image has keys and values of its own in every layer, as in everything released. Otherwise image and
    text are attended to together.
    """
    vace_layers: tuple[int, ...] = ()
    """Layers that a block of the control ladder feeds (VACE); the first is 0. Empty: there is no such ladder."""
    control_channels: int = 96
    """Channels of the control video: latents of what is kept 16 and of what changes 16, mask 64. Only with VACE."""

    def __post_init__(self) -> None:
        if not isinstance(self.patch_size, tuple | list) or len(self.patch_size) != 3:
            raise ValueError(f"patch_size is {self.patch_size}, but must be three numbers: frames, rows, columns")
        object.__setattr__(self, "patch_size", tuple(self.patch_size))  # JSON and TOML have lists only
        object.__setattr__(self, "vace_layers", tuple(self.vace_layers))
        others = ("patch_size", "eps", "image_dim", "image_kv", "vace_layers")
        sizes = {name: size for name, size in vars(self).items() if name not in others}
        sizes |= {f"patch_size[{i}]": size for i, size in enumerate(self.patch_size)}
        sizes |= {} if self.image_dim is None else {"image_dim": self.image_dim}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} is {size}, but must be a whole number of at least 1")
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


def flops(config: WanConfig, tokens: int, text: int | None = None, image: int | None = None) -> int:
    """FLOPs of one forward pass over one sample with one timestep, a multiply-add counted as two.

    Args:
        tokens: video tokens L, that is latent frames x rows x columns / patch volume.
        text, image: rows of text and CLIP tokens, if they are not those of the config.

    A backward pass costs twice as much; full recompute adds one more forward (not counted in MFU).
    """
    linear, attention = _linear_and_attention(config, tokens, text, image)
    return linear + attention


def train_flops(config: WanConfig, tokens: int, trained: float = 1.0, control_trained: float | None = None) -> int:
    """FLOPs of forward and backward over one sample.

    trained: part of the weights that are trained. The backward of a frozen linear costs once, not twice: its weight
    needs no gradient. (Under adapters 0; their own cost is left out.) `control_trained` says it of the control ladder.
    Where that alone is trained, the first layer, into which nothing trained flows, has no backward at all.
    """
    linear, attention = _linear_and_attention(config, tokens)
    control = _control_linears(config, tokens)
    control_trained = trained if control_trained is None else control_trained
    total = (2 + trained) * (linear - control) + (2 + control_trained) * control + 3 * attention
    if control and not trained and control_trained:
        blocks = config.num_layers + len(config.vace_layers)
        total -= _block_linears(config, tokens, config.text_tokens) + 2 * attention // blocks
    return round(total)


def _linear_and_attention(
    config: WanConfig, tokens: int, text: int | None = None, image: int | None = None
) -> tuple[int, int]:
    text = config.text_tokens if text is None else text
    image = (config.image_tokens if config.image_dim else 0) if image is None else image
    D, L = config.dim, tokens
    patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    attention = 4 * L * L * D + 4 * L * (text + image) * D
    ends = 2 * L * patch * (config.in_channels + config.out_channels) * D
    embed_text = 2 * text * (config.text_dim * D + D * D)
    embed_time = 2 * (config.freq_dim * D + 7 * D * D)
    embed_image = 0 if config.image_dim is None else 2 * image * (config.image_dim**2 + config.image_dim * D)
    outside = ends + embed_text + embed_time + embed_image + _control_linears(config, tokens, text, image)
    blocks = config.num_layers + len(config.vace_layers)
    return config.num_layers * _block_linears(config, L, text + image) + outside, blocks * attention


def _block_linears(config: WanConfig, tokens: int, context: int) -> int:
    D = config.dim
    on_tokens = 6 * D * D + 2 * D * config.ffn_dim  # q k v o of self-attention, q o of cross-attention, feed-forward
    return 2 * tokens * on_tokens + 2 * context * 2 * D * D  # and k v of cross-attention on the context


def _control_linears(config: WanConfig, tokens: int, text: int | None = None, image: int | None = None) -> int:
    """Of the whole control ladder: its patches, its blocks, the projections before the first and behind each."""
    if not config.vace_layers:
        return 0
    text = config.text_tokens if text is None else text
    image = (config.image_tokens if config.image_dim else 0) if image is None else image
    D, blocks = config.dim, len(config.vace_layers)
    patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    projections = (blocks + 1) * 2 * tokens * D * D + 2 * tokens * patch * config.control_channels * D
    return blocks * _block_linears(config, tokens, text + image) + projections
