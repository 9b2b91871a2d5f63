"""The data JSON of MindSpeed-MM (`data_3b.json`): which files are trained on, with which media and options.

Its paths begin where the program runs, as in MindSpeed-MM. A key that is unknown is refused, as there; one that asks
for what is not done here as well, with the reason. What needs no counterpart is named in `notes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mm_data.conversations.formats import Tags
from mm_data.conversations.index import index_items
from mm_data.conversations.reader import Source
from mm_data.files import find_fault, parse_json, read_text, show

_LARGEST = 1 << 20  # bytes of a data JSON

# (key, its default there) -> field of ChatOptions
_OPTIONS = {
    "image_max_pixels": ("image_max_pixels", 768 * 768),
    "image_min_pixels": ("image_min_pixels", 32 * 32),
    "video_max_pixels": ("video_max_pixels", 256 * 256),
    "video_min_pixels": ("video_min_pixels", 16 * 16),
    "video_fps": ("video_fps", 2.0),
    "video_maxlen": ("video_max_frames", 128),
}
_REFUSED = {
    "image_do_pan_and_scan": "is of another model",
    "crop_to_patches": "is of another model",
    "use_audio_in_video": "asks for sound, which is not read",
    "tool_format": "asks for calls of tools, which are not trained",
    "cutoff_len": "is refused there too: the longest conversation is --data.max_tokens",
    "ranking": "asks for pairs of answers, which are not trained",
    "chosen": "asks for pairs of answers, which are not trained",
    "rejected": "asks for pairs of answers, which are not trained",
    "audios": "asks for sound, which is not read",
}
_WITHOUT_NEED = {
    "preprocess_parameters": (
        *("use_fast_tokenizer", "split_special_tokens", "image_resolution", "video_resolution", "audio_sampling_rate"),
    ),
    "basic_parameters": (
        *("cache_dir", "preprocessing_batch_size", "preprocessing_num_workers", "streaming", "overwrite_cache"),
        *("preprocess_on_fly", "enable_thinking", "packing", "neat_packing"),
    ),
    "attr": ("observation_tag", "function_tag"),
}
_KNOWN = {
    "preprocess_parameters": ("model_name_or_path", "image_do_pan_and_scan", "crop_to_patches", "use_audio_in_video"),
    "basic_parameters": (
        *("template", "dataset_dir", "dataset", "train_on_prompt", "mask_history", "max_samples", "tool_format"),
        *("val_dataset", "val_max_samples", "val_rate", "cutoff_len"),
    ),
    "attr": (
        *("system", "images", "videos", "audios", "messages", "role_tag", "content_tag", "user_tag", "assistant_tag"),
        *("system_tag", "ranking", "chosen", "rejected", "formatting"),
    ),
}
_TEMPLATE = "qwen2vl"


@dataclass(frozen=True)
class DataJson:
    """processor: the folder of tokenizer and processor. options: fields of `ChatOptions`. notes: what has no effect."""

    sources: tuple[Source, ...]
    validation: tuple[Source, ...]
    processor: str | None
    options: Mapping[str, Any]
    notes: tuple[str, ...]


def is_data_json(path: str | Path) -> bool:
    """Whether a file is a data JSON, and no list of conversations."""
    path = Path(path)
    if find_fault(path) or path.stat().st_size > _LARGEST:
        return False
    try:
        found = parse_json(read_text(path), path)
    except ValueError:
        return False
    return isinstance(found, dict) and "dataset_param" in found


def read_data_json(path: str | Path) -> DataJson:
    """Raises ValueError, naming the key, for what is unknown or cannot be done."""
    path = Path(path)
    top = parse_json(read_text(path), path)
    if not isinstance(top, dict) or not isinstance(top.get("dataset_param"), dict):
        raise ValueError(f"{path} has no dataset_param: it is no data JSON of MindSpeed-MM")
    param = top["dataset_param"]
    if param.get("dataset_type") != "huggingface":
        raise ValueError(
            f"{path}: dataset_type is {show(param.get('dataset_type'))}; conversations are of 'huggingface'"
        )
    _refuse_unknown(path, "dataset_param", param, ("dataset_type", *_KNOWN))
    tables = {name: _table(path, param, name) for name in _KNOWN}
    process, basic, attr = tables.values()
    if basic.get("template") not in (None, _TEMPLATE):
        raise ValueError(
            f"{path}: template is {show(basic['template'])}; it must be {_TEMPLATE}, that of the model's folder"
        )
    if attr.get("formatting") not in (None, "sharegpt"):
        raise ValueError(f"{path}: formatting is {show(attr['formatting'])}; only sharegpt is read")
    if basic.get("val_rate") and not basic.get("val_dataset"):
        raise ValueError(f"{path}: val_rate is {show(basic['val_rate'])}: name a file as val_dataset instead")
    dataset = _text(path, basic, "dataset")
    if not dataset:
        raise ValueError(f"{path}: no dataset in basic_parameters: name the file of conversations")
    media, tags = _text(path, basic, "dataset_dir") or "data", _read_tags(path, attr)
    unused = [name for table, names in _WITHOUT_NEED.items() for name in names if tables[table].get(name) is not None]
    notes = [f"not needed here: {', '.join(unused)}"] if unused else []
    if "dataloader_param" in top:
        notes.append("dataloader_param is not read: order, batches and workers are options of the training")
    return DataJson(
        sources=_sources(dataset, media, tags, _count(path, basic, "max_samples")),
        validation=_sources(_text(path, basic, "val_dataset"), media, tags, _count(path, basic, "val_max_samples")),
        processor=_text(path, process, "model_name_or_path"),
        options={
            **{field: process.get(key, default) for key, (field, default) in _OPTIONS.items()},
            **{key: bool(basic.get(key)) for key in ("mask_history", "train_on_prompt")},
            "resize": "nearest",
        },
        notes=tuple(notes),
    )


def _table(path: Path, param: dict, name: str) -> dict:
    table = param.get(name)
    if not isinstance(table, dict):
        raise ValueError(f"{path}: {name} of dataset_param is {show(table)}, not an object")
    options = tuple(_OPTIONS) if name == "preprocess_parameters" else ()
    _refuse_unknown(path, name, table, (*_KNOWN[name], *_WITHOUT_NEED[name], *options))
    for key, reason in _REFUSED.items():
        if table.get(key):
            raise ValueError(f"{path}: {key} of {name} is {show(table[key])}, which {reason}")
    return table


def _refuse_unknown(path: Path, name: str, table: dict, known: tuple[str, ...]) -> None:
    for key in table:
        if key not in known:
            near = get_close_matches(key[:80], known, n=1)
            raise ValueError(
                f"{path}: unknown key {show(key)} in {name}" + (f", did you mean {near[0]}?" if near else "")
            )


def _text(path: Path, table: dict, key: str) -> str | None:
    value = table.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{path}: {key} is {show(value)}; it must be a text")
    return value


def _count(path: Path, table: dict, key: str) -> int | None:
    value = table.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{path}: {key} is {show(value)}; it must be a whole number from 1 on, or null")
    return value


def _sources(files: str | None, media: str, tags: Tags | None, most: int | None) -> tuple[Source, ...]:
    """The files of a comma list. `most` items are taken of all of them together, from the first."""
    paths = [path.strip() for path in (files or "").split(",") if path.strip()]
    sources = [Source(path, media=media, tags=tags) for path in paths]
    if most is None:
        return tuple(sources)
    taken = []
    for source in sources:
        if most > 0:
            taken.append(replace(source, max_items=most))
            most -= len(index_items(source.path)) if len(sources) > 1 else most
    return tuple(taken)


def _read_tags(path: Path, attr: dict) -> Tags | None:
    """None where all names are those that are read anyway."""
    names = {key: _text(path, attr, key) for key in _KNOWN["attr"] if isinstance(attr.get(key), str)}
    tags = Tags(
        messages=names.get("messages", "conversations"),
        role=names.get("role_tag", "from"),
        content=names.get("content_tag", "value"),
        images=names.get("images"),
        videos=names.get("videos"),
        system=names.get("system"),
        user=names.get("user_tag", "human"),
        assistant=names.get("assistant_tag", "gpt"),
        system_role=names.get("system_tag", "system"),
    )
    usual = (
        tags.messages in ("messages", "conversations")
        and (tags.role, tags.content) in (("role", "content"), ("from", "value"))
        and (tags.user, tags.assistant, tags.system_role)
        in (("user", "assistant", "system"), ("human", "gpt", "system"))
        and tags.images in (None, "images", "image")
        and tags.videos in (None, "videos", "video")
        and tags.system in (None, "system")
    )
    return None if usual else tags
