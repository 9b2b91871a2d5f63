"""The parts of a model in training: their learning rates, and what a person is told of them before the first step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import nn

from mm_models.families import family_of
from mm_models.parts import divide, find_parameters
from mm_train.config import Config, OptimConfig


def find_rates(model: nn.Module, config: OptimConfig) -> dict[str, float]:
    """The learning rates that differ from `config.lr`, by the names of trained parameters of the whole model.

    ValueError for one that no parameter has, or only parameters that are not trained.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    rates = {}
    for wanted, rate in config.rates.items():
        found = trained.intersection(find_parameters(model, wanted, "--optim.rates"))
        if not found:
            raise ValueError(
                f"--optim.rates {wanted!r}: nothing of it is trained, so it has no rate; train it (--trained, or "
                "--lora.targets), or leave it out"
            )
        rates |= dict.fromkeys(found, rate)
    return {name: rate for name, rate in rates.items() if rate != config.lr}


def tabulate(model: nn.Module, rates: Mapping[str, float], config: Config) -> list[str]:
    """A row for each part: its parameters, and how many of them are trained, at which rate. Empty for a model of a
    family without parts, all of which has one rate.
    """
    family = family_of(model.config)
    if not family.parts and not rates:
        return []
    part_of = divide(model)
    sizes, trained, adapted = Counter(), Counter(), set()
    for name, parameter in model.named_parameters():
        part = part_of[name]
        if ".lora_" in name:
            adapted.add(part)
        else:
            sizes[part] += parameter.numel()
        if parameter.requires_grad:
            trained[part, rates.get(name, config.optim.lr)] += parameter.numel()
    width, digits = max(map(len, sizes)), len(f"{max(sizes.values()):,}")
    rows = []
    for part, size in sizes.items():
        shares = [f"{count:,} trained at {rate:g}" for (of, rate), count in sorted(trained.items()) if of == part]
        what = " (adapters)" if part in adapted else ""
        rows.append(f"{part:{width}}  {size:{digits},} parameters, {', '.join(shares) or 'none trained'}{what}")
    if ignored := [part for part in family.unserved if part in adapted]:
        rows.append(
            f"note: servers such as vLLM leave out adapters on {' and '.join(ignored)} unless told otherwise; merged "
            "into the weights they count (python -m mm_train.export RUN --merge true --output W)"
        )
    return rows
