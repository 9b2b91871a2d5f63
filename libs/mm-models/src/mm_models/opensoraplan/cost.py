"""What an Open-Sora-Plan costs: floating-point operations of a forward pass and of training."""

from collections.abc import Mapping
from math import prod

from torch import Tensor, nn

from mm_models.layers import count_flowing
from mm_models.opensoraplan.config import OpenSoraPlanConfig


class Cost:
    """`cost(tensors of a batch) -> (its tokens, FLOPs of training on it)`.

    Frozen weights cost less in the backward. Adapters are left out, as in every MFU. What is masked is computed all the
    same, and counts.
    """

    def __init__(self, model: nn.Module) -> None:
        self.config = model.config
        own = [parameter for name, parameter in model.named_parameters() if ".lora_" not in name]
        trained = sum(parameter.numel() for parameter in own if parameter.requires_grad)
        self.trained = trained / max(1, sum(parameter.numel() for parameter in own))
        behind = ("proj_out.", "scale_shift_table")
        self.flows = count_flowing(model, "transformer_blocks", behind) / self.config.num_layers

    def __call__(self, tensors: Mapping[str, Tensor]) -> tuple[int, float]:
        samples, tokens = len(tensors["latents"]), prod(tensors["latents"].shape[2:]) // prod(self.config.patch_size)
        return samples * tokens, samples * train_flops(self.config, tokens, self.trained, self.flows)


def flops(config: OpenSoraPlanConfig, tokens: int, text: int | None = None) -> int:
    """FLOPs of one forward pass over one sample, a multiply-add counted as two.

    Args:
        tokens: video tokens L, that is latent frames x rows x columns / patch volume.
        text: rows of text, the padding among them, if they are not those of the config.

    A backward pass costs twice as much; full recompute adds one more forward (not counted in MFU).
    """
    linear, attention = _linear_and_attention(config, tokens, text)
    return linear + attention


def train_flops(config: OpenSoraPlanConfig, tokens: int, trained: float = 1.0, flows: float = 1.0) -> int:
    """FLOPs of forward and backward over one sample.

    trained: part of the weights that are trained. The backward of a frozen linear costs once, not twice: its weight
    needs no gradient. (Under adapters 0; their own cost is left out.) flows: the share of the layers into which
    something trained flows; those before them have no backward.
    """
    linear, attention = _linear_and_attention(config, tokens)
    return round((1 + flows + trained) * linear + (1 + 2 * flows) * attention)


def _linear_and_attention(config: OpenSoraPlanConfig, tokens: int, text: int | None = None) -> tuple[int, int]:
    text = config.text_tokens if text is None else text
    D, L = config.dim, tokens
    on_tokens = 6 * D * D + 2 * D * config.ffn_dim  # q k v o of self-attention, q o of cross-attention, feed-forward
    block = 2 * L * on_tokens + 2 * text * 2 * D * D  # and k v of cross-attention on the text
    attention = 4 * L * L * D + 4 * L * text * D
    ends = 2 * L * prod(config.patch_size) * (config.in_channels + config.out_channels) * D
    embed_text = 2 * text * (config.text_dim * D + D * D)
    embed_time = 2 * (config.freq_dim * D + 7 * D * D)
    return config.num_layers * block + ends + embed_text + embed_time, config.num_layers * attention
