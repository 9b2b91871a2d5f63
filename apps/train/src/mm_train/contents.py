"""What a run reads besides its configuration: the same on all ranks, and the same again when the run is continued.

Told by what files hold, not by their names or times: sizes and a part of the bytes, which is cheap also for terabytes.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_convert import open_experts, read_toml, weight_files
from mm_convert.cli.arguments import dump
from mm_data import FeatureDataset, files_below, identify_files, list_files, read_manifest
from mm_parallel.guard import agree
from mm_parallel.guard.agree import COPY
from mm_train.config import Config
from mm_train.conversations import find_files, find_processor_files, read_sources
from mm_train.objective import architecture
from mm_train.resume import find_checkpoint

if TYPE_CHECKING:
    from mm_train.data import TrainingData

Contents = dict[str, dict[str, str]]
"""By flag, the identity of each file by its name."""

# What a continued run reads again, and what it was trained on before.
AGAIN = (
    "weights",
    *("data.features", "data.manifest", "data.encoders", "data.conversations", "data.processor"),
    *("validation.features", "validation.conversations"),
)


def identify(config: Config, data: TrainingData, continuing: bool) -> Contents:
    """What lies at the paths of a run now; of a continued one without the weights that it does not read again."""
    found = find_all(config, data.files, continuing)
    return {flag: identify_files(those) | data.contents.get(flag, {}) for flag, those in found.items()}


def read_contents(config: Config) -> Contents:
    """The same before there is any data: of a list of videos all that it names, whether it can be used or not."""
    continuing = find_checkpoint(config)[0] is not None
    return {flag: identify_files(those) for flag, those in find_all(config, _find_data(config), continuing).items()}


def _find_data(config: Config) -> dict[str, Mapping[str, Path]]:
    """By flag, what samples are read from."""
    data, (family, shape) = config.data, architecture(config)
    if family.chat is not None:
        return find_conversations(config)
    if data.features is not None:
        return {"data.features": FeatureDataset(data.features, None).files}
    lists = list_files(data.manifest)
    samples = read_manifest(data.manifest, lambda said: None, data.caption)
    files = {str(file): file for file in (*lists, *(file for sample in samples for file in sample.files))}
    return {"data.manifest": files, "data.encoders": encoder_files(data.encoders, family.video.encoders(shape))}


def find_conversations(config: Config) -> dict[str, Mapping[str, Path]]:
    """By flag, the files of conversations and of their processor."""
    sources = read_sources(config.data.conversations, "--data.conversations")
    return {"data.conversations": find_files(sources), "data.processor": find_processor_files(config)}


def find_all(config: Config, data: Mapping[str, Mapping[str, Path]], continuing: bool) -> dict[str, Mapping[str, Path]]:
    """By flag, all files that a run reads. data: those of its samples."""
    files: dict[str, Mapping[str, Path]] = {}
    if config.weights != "random" and (config.has_frozen or not continuing):
        files["weights"] = _weight_files(Path(config.weights), config)
    if config.lora.weights is not None and not continuing:
        files["lora.weights"] = _weight_files(config.lora.weights, config)
    files |= data
    if config.validation.features is not None:
        files["validation.features"] = FeatureDataset(config.validation.features, None).files
    if config.validation.conversations:
        files["validation.conversations"] = find_files(
            read_sources(config.validation.conversations, "--validation.conversations")
        )
    family, shape = architecture(config)
    if config.sample.lora is not None:
        files["sample.lora"] = weight_files(config.sample.lora)
    if config.sample.encoders and (config.sample.prompts or config.sample.from_validation):
        files["sample.encoders"] = encoder_files(config.sample.encoders, family.video.encoders(shape))
    return files


def check_ranks(contents: Contents) -> None:
    """Raise ValueError, naming file and ranks, unless all of them see the same."""
    agree(
        {f"--{flag} {name}": found for flag, those in contents.items() for name, found in those.items()},
        "what is read",
        way_out=COPY,
    )


def check_again(contents: Contents, saved: dict[str, Any], found: Path, config: Config) -> list[str]:
    """What has changed since the checkpoint `found`, with progress `saved`, was written, as far as it is accepted.

    Raises ValueError for what is not: features, or a base below adapters, of other contents make another run.
    """
    changed = []
    before, now_said = read_toml(found / "config.toml"), tomllib.loads(dump(config))
    for flag in AGAIN:
        then, now = saved.get("contents", {}).get(flag), contents.get(flag)
        if then is None or now is None or then == now:
            continue
        section, _, name = flag.partition(".")
        if section == "validation" and before[section].get(name) != now_said[section][name]:
            continue  # other ones were asked for
        differing = _differing(then, now)
        if config.checkpoint.resume != "changed":
            raise ValueError(
                f"{found} was made with other contents of --{flag}: {differing}. That would not be the same run: put "
                "the old files back, take the new ones by --checkpoint.resume changed, or give a new --output"
            )
        changed.append(f"contents of {flag}: {differing}")
    return changed


def check_base(config: Config, saved: dict[str, Any], found: Path) -> None:
    """Raise ValueError where the base that a part of the weights of the checkpoint `found` is left in has changed."""
    then = saved.get("contents", {}).get("weights")
    if then is None:
        return
    now = identify_files(_weight_files(Path(config.weights), config))
    if then != now:
        raise ValueError(
            f"{found} was trained on other contents of --weights {config.weights}: {_differing(then, now)}. What was "
            "not trained is taken from there: put the old files back"
        )


def _differing(then: dict[str, str], now: dict[str, str]) -> str:
    names = [name for name in then | now if then.get(name) != now.get(name)]
    first = f"{names[0]} was {then.get(names[0], 'missing')}, and is {now.get(names[0], 'missing')}"
    return f"{first}; {len(names) - 1} more differ" if len(names) > 1 else first


def _weight_files(path: Path, config: Config) -> Mapping[str, Path]:
    """By name, those of the models that are trained: of two, each name begins with its expert."""
    pair = open_experts(path) if config.expert and path.is_dir() else None
    of = {one.expert: weight_files(getattr(pair, one.expert) if pair else path) for one in config.trainees}
    if len(of) == 1:
        return of[config.expert]
    return {f"{expert}/{name}": file for expert, files in of.items() for name, file in files.items()}


def encoder_files(path: Path, parts: Sequence[str]) -> dict[str, Path]:
    """The files of those folders of a diffusers directory that are there."""
    return {f"{part}/{name}": file for part in parts for name, file in files_below(path / part).items()}
