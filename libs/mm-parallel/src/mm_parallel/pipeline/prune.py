"""What a pipeline rank keeps of a model."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping

from torch import Tensor, nn

Owner = int | str
"""Whose a part is: the number of a layer, "first" or "last" (stage)."""


def prune(model: nn.Module, last: Collection[str], companions: Mapping[str, int], mine: Collection[Owner]) -> set[str]:
    """Drops in place what is not `mine`: modules and parameters become None, so that the names of others stay.

    Layers belong to themselves, and modules of `companions` to the layer whose number they have; of what is left, the
    names in `last` belong to "last", everything else to "first". What holds no weights is everybody's.

    Returns the names in the state dict that are gone. Raises ValueError for a weight that two stages would share, and
    for a plan that does not fit.
    """
    before = set(model.state_dict())
    parts = list(_parts(model, last, companions))
    owners: dict[Tensor, dict[Owner, str]] = defaultdict(dict)
    for parent, key, name, owner in parts:
        part = getattr(parent, key)
        for weight in [part] if isinstance(part, Tensor) else part.parameters():
            owners[weight][owner] = name
    for shared in owners.values():
        if len(shared) > 1:
            raise ValueError(
                f"{' and '.join(shared.values())} share a weight, but not a pipeline stage: give each its own, or "
                "leave pp_layers out (FSDP, tp and cp take a shared weight)"
            )
    for parent, key, name, owner in parts:
        part = getattr(parent, key)
        holds = name in before if isinstance(part, Tensor) else bool(part.state_dict())
        if owner not in mine and (holds or isinstance(owner, int)):
            setattr(parent, key, None)
    return before - set(model.state_dict())


def find_trained(model: nn.Module, last: Collection[str], companions: Mapping[str, int]) -> set[Owner]:
    """Whose parts hold a parameter that is trained."""
    owners: set[Owner] = set()
    for parent, key, _, owner in _parts(model, last, companions):
        part = getattr(parent, key)
        weights = [part] if isinstance(part, Tensor) else part.parameters()
        owners |= {owner} if any(weight.requires_grad for weight in weights) else set()
    return owners


def _parts(
    model: nn.Module, last: Collection[str], companions: Mapping[str, int]
) -> Iterator[tuple[nn.Module, str, str, Owner]]:
    """(parent, key, name, owner) of every layer, and of the largest modules and tensors outside of them."""
    layers = {layer: i for i, layer in enumerate(model.layers)}
    found = {name for name, module in model.named_modules() if module in layers}
    if len(found) != len(model.layers):
        raise ValueError(f"{len(model.layers)} model.layers, but {len(found)} of them are modules with a name")
    layers |= {model.get_submodule(name): number for name, number in companions.items()}
    found |= set(companions)
    above = {name.rsplit(".", depth)[0] for name in found for depth in range(1, name.count(".") + 1)}
    if holds_layers := above & set(last):
        raise ValueError(f"plan.last: {min(holds_layers)} holds layers, and they belong to stages of their own")

    def walk(parent: nn.Module, prefix: str) -> Iterator[tuple[nn.Module, str, str, Owner]]:
        for key, part in (parent._modules | parent._parameters | parent._buffers).items():
            name = prefix + key
            if name in above:
                yield from walk(part, f"{name}.")
            elif part is not None:
                end = "last" if name in last else "first"
                yield parent, key, name, layers.get(part, end) if isinstance(part, nn.Module) else end

    return walk(model, "")
