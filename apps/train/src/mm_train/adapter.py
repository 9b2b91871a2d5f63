"""An adapter that a run goes on from: its rank, alpha and targets are those of the run, or the run is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping

from mm_convert import Adapter, expert_of, open_experts, open_lora
from mm_convert.cli.checks import NotHere
from mm_convert.lora.base import check_base
from mm_train.config import Config
from mm_train.objective import architecture


def open_adapter(config: Config) -> Adapter:
    """The adapter that `config` names, of two experts that of the one that is trained; only headers are read.

    ValueError for what is no adapter, or that of the other expert.
    """
    path, expert = config.lora.weights, config.expert
    if not path.exists():
        raise ValueError(f"--lora.weights {path} does not exist")
    of_folder = expert_of(path)
    if expert and of_folder and of_folder != expert:
        raise ValueError(f"--lora.weights {path} is for {of_folder} noise, and --expert is {expert}: give the other")
    pair = open_experts(path) if expert else None
    try:
        return open_lora(getattr(pair, expert) if pair else path, expert=expert or "")
    except ValueError as error:
        way = (
            f"; `mm-convert convert {path} TARGET --lora_alpha …` writes it down" if "lora_alpha" in str(error) else ""
        )
        raise ValueError(f"--lora.weights: {error}{way}") from error


def describe_base(config: Config) -> dict[str, str]:
    """What adapters of this run are trained on, as far as it shows without the weights; see `mm_convert.lora.base`."""
    family, shape = architecture(config)
    facts = {"family": family.name, "model": config.model}
    facts |= {"prediction": family.video.prediction(shape)} if family.video else {}
    return facts | ({"expert": config.expert} if config.expert else {})


def check_adapter(config: Config) -> str:
    """Raise ValueError unless the adapter to go on from, if there is one, has the one rank and alpha of this run.
    Returns what it is.
    """
    if config.lora.weights is None:
        return NotHere("no --lora.weights: nothing is gone on from")
    path, adapter = config.lora.weights, open_adapter(config)
    if adapter.rank is None or adapter.alpha is None:
        several = "ranks" if adapter.rank is None else "alphas"
        raise ValueError(
            f"--lora.weights {path} has {several} by module, and an adapter is trained with one for all: merge it into "
            f"the base (mm-convert convert {config.weights} TARGET --lora {path}), and train a new one on that"
        )
    check_base(adapter.trained_on, describe_base(config), f"--lora.weights {path}")
    wanted = {"rank": adapter.rank, "alpha": adapter.alpha}
    if other := [f"{name} {value:g}" for name, value in wanted.items() if getattr(config.lora, name) != value]:
        flags = " ".join(f"--lora.{name} {value:g}" for name, value in wanted.items())
        raise ValueError(f"--lora.weights {path} was trained with {' and '.join(other)}: give {flags}")
    notes = "".join(f"\n{note}" for note in adapter.notes)
    return f"{len(adapter.modules)} linears in the format of {adapter.format}{notes}"


def check_targets(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], targets: Collection[str]) -> None:
    """Raise ValueError unless the adapter stands beside exactly the linears that are trained, and fits them.

    Args:
        shapes: of all weights of the model, by the names of their modules.
        targets: the linears that are trained.
    """
    theirs = {name: tuple(module.shape) for name, module in adapter.modules.items()}
    if strange := [name for name in theirs if shapes.get(name) != theirs[name]]:
        there = list(shapes[strange[0]]) if strange[0] in shapes else "nothing"
        raise ValueError(
            f"--lora.weights is for another model: its {strange[0]} is {list(theirs[strange[0]])}, here it is {there}"
        )
    if odd := sorted(theirs.keys() ^ set(targets)):
        ends = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in theirs})  # in every block, if they are
        meant = {name for name in shapes if any(f".{name}".endswith(f".{end}") for end in ends)}
        names = json.dumps(ends if meant == theirs.keys() else sorted(theirs))
        raise ValueError(
            f"--lora.weights has adapters of {len(theirs)} linears, --lora.targets name {len(targets)}, and {odd[0]} "
            f"is in one alone: give --lora.targets '{names}'"
        )
