"""What all encoders have in common: how their folders are loaded, whether all of them was used, and who they are."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mm_models.folder import check_tokenizer, check_weights

_TELLING = (".json", ".model", ".safetensors", ".ckpt", ".pt")


def load_strictly(kind: type, folder: Path, dtype: torch.dtype) -> Any:
    """A model of a class of transformers or diffusers, frozen.

    Nothing but the folder's own safetensors and config.json is read, no code of it is run, and nothing is downloaded.
    Raises ValueError unless its tensors are exactly those of the model.
    """
    of_diffusers = hasattr(kind, "load_config")
    numbers = check_weights(folder, kind.__name__ if of_diffusers else kind.config_class.model_type)
    with readable(folder, kind.__name__):
        size = _size(kind, folder, of_diffusers)
    if size > 2 * numbers + (1 << 24):  # much larger; what is missing of a similar size is named below
        raise ValueError(f"{folder / 'config.json'} describes {size:,} parameters, but the weights hold {numbers:,}")
    options = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    with readable(folder, kind.__name__):
        if of_diffusers:
            model, found = kind.from_pretrained(folder, torch_dtype=dtype, low_cpu_mem_usage=False, **options)
        else:  # where mismatched sizes would be an error that does not name them; they are refused below
            model, found = kind.from_pretrained(folder, dtype=dtype, ignore_mismatched_sizes=True, **options)
    _check_loaded(folder, found)
    return model.eval().requires_grad_(False)


def load_tokenizer(folder: Path, vocabulary: int) -> Any:
    """The tokenizer of a folder, of which no code is run.

    vocabulary: rows of the embedding that its tokens look up.
    Raises ValueError for one that is damaged, does not fit, or does not end a prompt as its model was trained.
    """
    from transformers import AutoTokenizer

    check_tokenizer(folder)
    if not (folder / "tokenizer.json").exists() and (folder / "spiece.model").exists():
        _require("sentencepiece", "google.protobuf", why=f"{folder / 'spiece.model'} is read by")
    with readable(folder, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        most = max(tokenizer.get_vocab().values())
        ids = tokenizer("").input_ids
    if most >= vocabulary:
        raise ValueError(
            f"{folder} has a token {most}, but the text encoder knows {vocabulary}: they do not belong together"
        )
    if not ids or ids[-1] != tokenizer.eos_token_id:
        raise ValueError(f"{folder} does not end a prompt with the mark of its end, so it is not the model's tokenizer")
    return tokenizer


def _require(*modules: str, why: str) -> None:
    """Raises ValueError for modules that are not installed, which a library would say in other words."""
    if missing := [name.removeprefix("google.") for name in modules if not find_spec(name)]:
        raise ValueError(f"{why} {' and '.join(missing)}, not installed here: pip install mm-models[encoders]")


@contextmanager
def readable(folder: Path, what: str) -> Iterator[None]:
    """transformers and diffusers in this block: silent, and whatever they raise of a folder is a ValueError of one
    line that names it.
    """
    with quiet():
        try:
            yield
        except (MemoryError, torch.OutOfMemoryError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of tokenizers is no Exception
            said = " ".join(str(error).split())
            raise ValueError(
                f"{folder} cannot be loaded as {what} ({type(error).__name__}: {said[:300]}): take the folder as the "
                "model's makers publish it"
            ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without their warnings, as what they warn of is refused here, and without bars where stderr is a file."""
    from transformers.utils import logging as bars

    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers")]
    levels = [logger.level for logger in loggers]
    hides = bars.is_progress_bar_enabled() and not sys.stderr.isatty()
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        if hides:
            bars.disable_progress_bar()
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if hides:
            bars.enable_progress_bar()


def check_finite(model: torch.nn.Module, place: Path) -> None:
    """Raises ValueError for weights that are NaN or infinite: of a VAE, videos would be black without a word."""
    if broken := [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
        raise ValueError(f"{place}: {len(broken)} tensors hold NaN or infinity, first {broken[0]}: download it again")


def _size(kind: Any, folder: Path, of_diffusers: bool) -> int:
    """Parameters of the model that config.json describes, which a library would fill with noise."""
    with torch.device("meta"):
        if of_diffusers:
            model = kind.from_config(kind.load_config(folder, local_files_only=True))
        else:
            model = kind(kind.config_class.from_pretrained(folder, local_files_only=True))
    return sum(parameter.numel() for parameter in model.parameters())


def _check_loaded(folder: Path, found: dict) -> None:
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
        for file in sorted(f for f in folder.iterdir() if f.suffix in _TELLING):
            size = file.stat().st_size
            digest.update(f"{folder.name}/{file.name}:{size}".encode())
            with open(file, "rb") as stream:
                for i in range(16):
                    stream.seek(max(0, size - block) * i // 15)
                    digest.update(stream.read(block))
    return digest.hexdigest()
