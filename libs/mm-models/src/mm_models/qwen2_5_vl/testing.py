"""A tiny Qwen2.5-VL in the files of the hub: tokenizer, chat template, processor, configuration and random weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm_models.qwen2_5_vl.config import Qwen25VLConfig
from mm_models.qwen2_5_vl.hub import write_config
from mm_models.qwen2_5_vl.presets import PRESETS

# In the order of their ids on the hub. Those that are no special tokens may stand in anybody's text.
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
ADDED = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)
_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
    "bos_token": "<|endoftext|>",
    "eos_token": "<|im_end|>",
}
# How a text is split before its bytes are merged, a fact about the released tokenizer.
SPLIT = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""  # noqa: E501
TEMPLATE = """\
{%- set seen = namespace(images=0, videos=0) -%}
{%- for turn in messages -%}
{%- if loop.first and turn.role != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{{ '<|im_start|>' + turn.role + '\\n' }}
{%- set parts = [{'text': turn.content}] if turn.content is string else turn.content -%}
{%- for part in parts -%}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
{%- set seen.images = seen.images + 1 -%}
{{ ('Picture ' + seen.images|string + ': ' if add_vision_id else '') + '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part.type == 'video' or 'video' in part -%}
{%- set seen.videos = seen.videos + 1 -%}
{{ ('Video ' + seen.videos|string + ': ' if add_vision_id else '') + '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- elif 'text' in part -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{{ '<|im_start|>assistant\\n' if add_generation_prompt else '' }}"""
TEXTS = (
    "You are a helpful assistant. system user assistant",
    "What is in this picture? Which colour is the shape, and where does it move? How many are there?",
    "The circle is red, the square is blue, the triangle is green. It moves to the left, to the right, up, down.",
)


def tiny_config(merges: int = 0, **fields: Any) -> Qwen25VLConfig:
    """The tiny preset with other fields, and with room for a tokenizer that has learned so many merges."""
    config = PRESETS["qwen2.5-vl-tiny"].config
    moved = {name: getattr(config, name) + merges for name in _TOKENS}
    return replace(config, vocab_size=config.vocab_size + merges, **moved | fields)


def write_hub_folder(
    path: Path | str,
    config: Qwen25VLConfig | None = None,
    seed: int = 0,
    *,
    texts: Iterable[str] = TEXTS,
    weights: bool = True,
) -> Path:
    """A folder like those of the hub; transformers opens it as it opens them.

    Args:
        path: the folder; made where it is missing.
        config: the sizes, by default those of the tiny preset. Its special tokens follow 256 bytes and the merges of
            the tokenizer, so its `bos_token` says how many merges there are; see `tiny_config`.
        seed: of the weights.
        texts: what the tokenizer learns its merges from.
        weights: whether to write model.safetensors, which takes transformers seconds.

    ValueError where the texts have fewer merges in them.
    """
    path, config = Path(path), config or tiny_config()
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(config.bos_token - 256, texts)
    wrong = [name for name, token in _TOKENS.items() if getattr(config, name) != tokenizer.token_to_id(token)]
    assert not wrong, f"{wrong} are not in the order of the released tokens behind {config.bos_token}: see tiny_config"
    _write_tokenizer(path, tokenizer)
    generation = {"bos_token_id": config.bos_token, "pad_token_id": config.bos_token, "do_sample": True}
    generation |= {"eos_token_id": [config.eos_token, config.bos_token], "temperature": 1e-6}
    _write(path / "generation_config.json", generation)
    _write(path / "preprocessor_config.json", _preprocessor(config))
    if weights:
        _write_weights(path, config, seed)
    _write(path / "config.json", write_config(config))
    return path


def _tokenizer(merges: int, texts: Iterable[str]):
    """Byte-level BPE: 256 bytes, merges, and the special tokens behind them."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=256 + merges, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(list(texts), trainer)
    if (found := tokenizer.get_vocab_size() - 256) < merges:
        raise ValueError(f"the texts have only {found} merges in them, and {merges} are wanted: give more texts")
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ADDED])
    return tokenizer


def _write_tokenizer(path: Path, tokenizer: Any) -> None:
    tokenizer.save(str(path / "tokenizer.json"))
    tokenizer.model.save(str(path))  # vocab.json and merges.txt
    kinds = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(tokenizer.token_to_id(token)): {"content": token, **kinds, "special": token in SPECIAL}
        for token in (*SPECIAL, *ADDED)
    }
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    _write(path / "tokenizer_config.json", config)
    _write(path / "chat_template.json", {"chat_template": TEMPLATE})


def _preprocessor(config: Qwen25VLConfig) -> dict[str, Any]:
    """As on the hub, with fewer pixels at most."""
    return {
        "min_pixels": 3136,
        "max_pixels": 100352,
        "patch_size": config.patch_size,
        "temporal_patch_size": config.temporal_patch_size,
        "merge_size": config.spatial_merge_size,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }


def _write_weights(path: Path, config: Qwen25VLConfig, seed: int) -> None:
    """model.safetensors with the names of the hub, made and saved by transformers."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**write_config(config)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # no parameter at a trivial value, and matrices that keep the size of a signal
        for name, parameter in model.named_parameters():
            parameter.normal_(generator=generator)
            if parameter.ndim > 1 and "embed_tokens" not in name:
                parameter.div_(parameter[0].numel() ** 0.5)
            elif parameter.ndim == 1 and name.endswith("weight"):
                parameter.mul_(0.3).add_(1)
            else:
                parameter.mul_(0.4)
    model.save_pretrained(path)


def _write(path: Path, json_: dict[str, Any]) -> None:
    path.write_text(json.dumps(json_, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
