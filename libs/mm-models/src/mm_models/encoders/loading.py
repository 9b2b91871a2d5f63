"""What all encoders have in common: where their files are, whether all were used, and who they are."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import torch

PARTS = ("text_encoder", "tokenizer", "vae")  # of every repository; image_encoder only of those with a CLIP branch


def part_of(path: Path | str, name: str) -> Path:
    """The folder of one part of a diffusers directory. Raises ValueError if it is not there."""
    folder = Path(path) / name
    if not folder.is_dir():
        parts = [f"{part}/" for part in (*PARTS, *({name} - set(PARTS)))]
        raise ValueError(
            f"{folder} is not a folder: {path} should be a diffusers directory with {', '.join(parts[:-1])} and "
            f"{parts[-1]}, as the model's makers publish it (on the hub its name often ends in -Diffusers)"
        )
    return folder


@contextmanager
def no_bar_in_logs() -> Iterator[None]:
    """transformers draws its bar also where stderr is a file; there it is off in this block."""
    from transformers.utils import logging

    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def load_strictly(kind: type, folder: Path, dtype: torch.dtype):
    """A model of a class of transformers, frozen. Raises ValueError unless the folder's tensors are exactly its own."""
    with no_bar_in_logs():
        model, found = kind.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # or the error would not name them; they are refused below
            output_loading_info=True,
        )
    check_loaded(folder, found)
    return model.eval().requires_grad_(False)


def check_loaded(folder: Path, found: dict) -> None:
    """Raises ValueError if a tensor was missing, unknown or misshapen, by the loading info of `from_pretrained`."""
    problems = {kind: sorted(map(str, found[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    for kind, keys in problems.items():
        if keys:
            raise ValueError(
                f"{folder}: {len(keys)} {kind.replace('_', ' ')}, first {', '.join(keys[:3])}: "
                "the weights do not belong to this config.json, or a file is incomplete"
            )


def identity(folders: list[Path], options: dict) -> str:
    """A hash that changes with the configuration or the weights; cheap: of a large file, its size and 16 samples."""
    digest = sha256(json.dumps(options, sort_keys=True).encode())
    block = 1 << 16
    for folder in folders:
        for file in sorted(f for f in folder.iterdir() if f.suffix in (".json", ".model", ".safetensors")):
            size = file.stat().st_size
            digest.update(f"{folder.name}/{file.name}:{size}".encode())
            with open(file, "rb") as stream:
                for i in range(16):
                    stream.seek(max(0, size - block) * i // 15)
                    digest.update(stream.read(block))
    return digest.hexdigest()
