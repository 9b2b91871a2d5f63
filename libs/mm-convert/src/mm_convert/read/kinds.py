"""What a set of tensors is that no family knows, by its names: for messages."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from mm_convert.tensors.views import FP8, LazyTensor

# A pattern that names are searched for -> what has such names. The first that fits most is meant.
_KINDS = {
    r"^(state|optimizer|exp_avg|param_groups)\b|\.(exp_avg(_sq)?|momentum_buffer)$": "states of an optimizer",
    r"(double|single)_blocks\.": "a transformer of HunyuanVideo or Flux",
    r"single_transformer_blocks\.": "a transformer of Flux or HunyuanVideo (diffusers)",
    r"joint_(transformer_)?blocks\.": "a transformer of Stable Diffusion 3",
    r"(input|output|down|up)_blocks\.\d+\.\d*\.?(resnets|attentions|in_layers|op|downsamplers|upsamplers)?": "a UNet",
    r"control_(model|add)|controlnet|input_hint_block": "a ControlNet",
    r"(resblocks|(vision|text)_model\.encoder)\.": "a CLIP encoder; take a diffusers repository's image_encoder/",
    r"(SelfAttention|EncDecAttention|DenseReluDense)\.": "a text encoder of the T5 family",
    r"(layers|h)\.\d+\.(self_attn|attn|attention|mlp)\.": "a language model",
    r"^(encoder|decoder)\.(conv_in|down|up|mid|layers)\b|quant_conv": "a VAE",
    r"transformer_blocks\.": "a transformer of another kind (LTX-Video, CogVideoX, Qwen-Image, …)",
    r"(emb_params|string_to_param|clip_[gl])$": "an embedding (textual inversion)",
}
_SCALES = re.compile(r"(^|[._])(scale_weight|weight_scale(_inv|_2)?|(scale_input|input_scale)|_?scales?|comfy_quant)$")
_QUANTISED = re.compile(
    r"\.(absmax|quant_map|quant_state\.\w+|SCB|qweight|qzeros|g_idx|weight_packed|weight_shape|nested_absmax)$"
)


def describe_names(names: Collection[str]) -> str:
    """What most of the names are, as `a VAE`; else the first words of them, with how many tensors each has."""
    counts = {what: sum(bool(re.search(pattern, name)) for name in names) for pattern, what in _KINDS.items()}
    what, count = max(counts.items(), key=lambda item: item[1])
    return what if 2 * count > len(names) else list_beginnings(names)


def list_beginnings(names: Iterable[str]) -> str:
    """`model.* (12 tensors), vae.* (3 tensors)`: what the most names begin with."""
    counts = Counter(name.partition(".")[0] + (".*" if "." in name else "") for name in names)
    shown = ", ".join(f"{word} ({count} tensors)" for word, count in counts.most_common(5))
    return shown + (f" and {len(counts) - 5} more" if len(counts) > 5 else "")


def refuse_quantised(tensors: Mapping[str, LazyTensor], where: str) -> None:
    """Raises ValueError for weights that mean nothing without the scales beside them, where those are not read."""
    packed = [name for name in tensors if _QUANTISED.search(name)]
    coded = any(tensor.dtype in (*FP8, "I8", "U8") for tensor in tensors.values())
    scaled = [name for name in tensors if coded and _SCALES.search(name)]
    if packed or scaled:
        kind = "is quantised" if packed else "is scaled fp8"
        first = (packed or scaled)[0]
        raise ValueError(
            f"{where} {kind}: its weights mean nothing without what stands beside them ({first}; "
            f"{len(packed) + len(scaled)} such tensors), which is not read. Take the file in bf16, fp16, ComfyUI's "
            "scaled fp8 or GGUF, or dequantise this one with the tool that made it"
        )
    whole = [name for name, tensor in tensors.items() if tensor.dtype in ("I8", "U8") and len(tensor.shape) > 1]
    if whole:
        raise ValueError(
            f"{where} is quantised: {whole[0]} is {tensors[whole[0]].dtype}, as are {len(whole) - 1} more, and nothing "
            "says of what scale. Take the file in bf16, fp16 or plain fp8"
        )
