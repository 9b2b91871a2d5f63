"""What a Wan costs: floating-point operations of a forward pass and of training."""

from collections.abc import Mapping
from math import prod

from torch import Tensor, nn

from mm_models.layers import count_flowing
from mm_models.wan.config import WanConfig


class Cost:
    """`cost(tensors of a batch) -> (its tokens, FLOPs of training on it)`.

    Frozen weights cost less in the backward. Adapters are left out, as in every MFU.
    """

    def __init__(self, model: nn.Module) -> None:
        self.config = model.config
        self.trained, self.control_trained = (_trained_part(model, control) for control in (False, True))
        self.flows = _find_flowing(model)

    def __call__(self, tensors: Mapping[str, Tensor]) -> tuple[int, float]:
        samples, tokens = len(tensors["latents"]), prod(tensors["latents"].shape[2:]) // prod(self.config.patch_size)
        trained = self.trained, self.control_trained, *self.flows
        return samples * tokens, samples * train_flops(self.config, tokens, *trained)


def _trained_part(model: nn.Module, control: bool) -> float:
    """The trained part of the model's own weights: of the control ladder, or of the rest."""
    sizes = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        if name.startswith("vace_") == control and ".lora_" not in name:
            sizes[parameter.requires_grad] += parameter.numel()
    return sizes[True] / max(1, sum(sizes.values()))


def _find_flowing(model: nn.Module) -> tuple[float, float]:
    """The share of the layers through which gradients flow: of the ladder, and of the control ladder."""
    layers, control = model.config.num_layers, model.config.vace_layers
    own = count_flowing(model, "blocks", ("head.", "vace_"))
    if not control:
        return own / layers, 1.0
    inside = count_flowing(model, "vace_blocks", ("head.", "blocks."))
    # what a control layer makes is added behind the layer that it is for
    reached = layers - 1 - control[-inside] if inside else 0
    return max(own, reached) / layers, inside / len(control)


def flops(config: WanConfig, tokens: int, text: int | None = None, image: int | None = None) -> int:
    """FLOPs of one forward pass over one sample with one timestep, a multiply-add counted as two.

    Args:
        tokens: video tokens L, that is latent frames x rows x columns / patch volume.
        text, image: rows of text and CLIP tokens, if they are not those of the config.

    A backward pass costs twice as much; full recompute adds one more forward (not counted in MFU).
    """
    linear, attention = _linear_and_attention(config, tokens, text, image)
    return linear + attention


def train_flops(
    config: WanConfig,
    tokens: int,
    trained: float = 1.0,
    control_trained: float | None = None,
    flows: float | None = None,
    control_flows: float = 1.0,
) -> int:
    """FLOPs of forward and backward over one sample.

    trained: part of the weights that are trained. The backward of a frozen linear costs once, not twice: its weight
    needs no gradient. (Under adapters 0; their own cost is left out.) `control_trained` says it of the control ladder.
    flows, control_flows: the share of the layers into which something trained flows; those before them have no
    backward. By default it is all, but where the control ladder alone is trained all but the first.
    """
    linear, attention = _linear_and_attention(config, tokens)
    control = _control_linears(config, tokens)
    control_trained = trained if control_trained is None else control_trained
    if flows is None:
        flows = 1 - (control > 0 and not trained and control_trained > 0) / config.num_layers
    context = config.text_tokens + (config.image_tokens if config.image_dim else 0)
    layers = config.num_layers * _block_linears(config, tokens, context)
    own = attention * config.num_layers // (config.num_layers + len(config.vace_layers))
    total = (2 + trained) * (linear - control - layers) + (1 + flows + trained) * layers + (1 + 2 * flows) * own
    total += (1 + control_flows + control_trained) * control + (1 + 2 * control_flows) * (attention - own)
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
