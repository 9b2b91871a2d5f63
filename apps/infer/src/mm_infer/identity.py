"""What videos are made with besides what each is made from: weights and encoders, by what their files hold."""

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from mm_convert import weight_files
from mm_data import files_below, identify_files
from mm_infer.config import Config
from mm_infer.loras import Lora, read_loras
from mm_infer.weights import Facts

Contents = dict[str, dict[str, str]]
"""By flag, the identity of each file by its name."""


def identify(config: Config, facts: Facts) -> Contents:
    """What lies in --weights, --encoders and --lora now: sizes and samples of bytes, cheap also for large files."""
    parts = facts.family.video.encoders(facts.config)
    files: dict[str, dict[str, Path]] = {
        "weights": weight_files(config.weights),
        "encoders": {
            f"{part}/{name}": file for part in parts for name, file in files_below(facts.repository / part).items()
        },
        "lora": _adapters(read_loras(config.lora)),
    }
    return {flag: identify_files(those) for flag, those in files.items()}


def _adapters(loras: Sequence[Lora]) -> dict[str, Path]:
    """Of several, the number of each stands before the names of its files."""
    if len(loras) == 1:
        return weight_files(loras[0].path)
    return {
        f"{number}/{name}": file for number, lora in enumerate(loras) for name, file in weight_files(lora.path).items()
    }


def digest(contents: Contents) -> dict[str, str]:
    """By flag, one hash for all files, under whatever names folders of the same content have."""
    return {
        flag: sha256(json.dumps(sorted(files.items())).encode()).hexdigest()[:16] for flag, files in contents.items()
    }
