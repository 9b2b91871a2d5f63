"""What a model family says about itself, as data, so that `parallelize` can cut it without knowing it."""

from collections import abc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn


class Sequence(NamedTuple):
    """What attention must know of a sequence of which a rank may hold a part; the same on every rank.

    A model may bring its own class: three fields of these names are enough.

    tokens: of the whole sequence.
    causal: token i attends to tokens 0 … i.
    segments: where packed samples part, from 0 to `tokens`: (0, 3, 9) are one of 3 tokens and one of 6. Tokens attend
        within their sample. None: one sample; (0,): none, of no token.
    """

    tokens: int
    causal: bool = False
    segments: tuple[int, ...] | None = None


class Ladder(Protocol):
    """A network that runs from stem to head: `head(layer(n-1, … layer(0, stem(…))))`.

    The stream is a NamedTuple of what travels up: tensors, and facts that are the same for every rank (numbers, tuples
    of them, a `Sequence`). A layer returns a stream of the same shapes and facts, and writes into none. Stem and head
    are methods, not submodules, so that parameter names stay the published ones; `layers` are modules, in the order in
    which they run.

    A pipeline runs stem, layers and head on the meta device as well, to learn what crosses between its stages. There an
    argument that is a tensor has a shape and no values. What the stem must know by value (a `Sequence`, the grids of
    images) is a number, a tuple of numbers, or a NamedTuple of these.

    To have its tokens cut over ranks, a ladder calls three seams, attributes named in its plan:

        split(stream) -> stream                 last in the stem; by default it returns the stream
        core(q, k, v, sequence, mask) -> out    every attention between tokens; q, out are B L H h, k, v are B L K h
        gather(x, sequence) -> x                in the head: B L … of this rank's tokens -> B L … of all

    where `sequence` is a `Sequence`, which the stream carries under this name, so that `split` knows it too. K divides
    H: neighbouring heads of q share one of k and v. `mask` may be left out: B tokens, bool, True for a token that is
    attended, of the whole sequence on every rank. So the field of the stream that carries it is none of the plan's
    `tokens`. Tokens that are masked still ask, and pass as all others.

    A ladder whose head multiplies by a vocabulary (`vocabulary` of its plan) calls for it, instead of the linear:

        token_losses(x, weight, labels) -> losses   B L D, V D, B L -> B L float32, 0 where a label is -100
        token_logits(x, weight) -> logits           B L D, V D -> B L V

    An inner ladder that works on items (images; a video is one, too) shares them over the context ranks by two seams:

        share(x, grids) -> (own x, own grids)       first of all: N … rows of all items -> those of this rank
        collect(y, grids) -> y                      at its end: M … rows of this rank's items -> of all, in their order

    Both are given the grids of all items: a tuple of tuples of numbers, whose product is the number of the item's rows
    in x. The first of them counts parts of equal size that do not know of each other (frames: attention and positions
    are within one). A rank may be given some of an item's parts, and no item at all.
    """

    @property
    def layers(self) -> abc.Sequence[nn.Module]: ...
    def stem(self, *batch: Any, **named: Any) -> Any: ...
    def layer(self, i: int, stream: Any) -> Any: ...
    def head(self, stream: Any) -> Tensor: ...


@dataclass(frozen=True)
class ParallelPlan:
    """How a model may be cut. What is left empty it cannot be.

    layers: patterns of module names, one dot-separated part at a time: `blocks.*` is `blocks.0`, `blocks.1`, … and not
        `blocks.0.norm`. One layer is the unit of sharding, of recompute and of pipeline stages.
    keep_fp32: patterns of parameter names that stay in fp32 when the rest computes in a lower dtype. Here `*` crosses
        dots: `*.modulation`.
    last: modules and parameters at the root that only `head` uses: a pipeline keeps them on its last stage, the layers
        where they belong, and everything else on the first.
    tokens: fields of the stream that hold tokens, with the dim in which. A field of size 1 there is the same for all
        tokens, and stays whole; not so the first.
    split, core, gather: where the three seams are (see `Ladder`).
    heads: attention heads; the ranks of tensor parallelism must divide them. Where there are several counts, all of
        them by name: {"key-value heads": 2, "heads": 16}.
    head_dim: elements of a head, for the choice of a kernel; 0: not said.
    columns: patterns of linears whose rows of the weight (columns of the output) are cut over tensor-parallel ranks;
        what they compute is local until a linear of `rows`, whose outputs are summed.
    rows: patterns of linears that take what `columns` make.
    norms: patterns of RMSNorms over all heads between the two, whose mean of squares is taken over the ranks.
    vocabulary: names of a linear without bias and of an embedding, each with a row of its weight for each token of the
        vocabulary; these are cut over tensor-parallel ranks. A tied head is the embedding alone.
    losses, logits: where the two seams of the vocabulary are (see `Ladder`).
    companions: modules by name that run just before a layer, in the same call of `layer`, with its number (a second
        ladder that runs in step). They are sharded and recomputed like layers, each by itself, and go with their layer
        to its pipeline stage.

    residual: the field of the stream that layers add to. Of its input, a layer that recomputes keeps this as autograd
        would; the rest of the stream is the same for all layers, and referred to. A layer may also be called with this
        tensor itself, and the rest behind it.
    inner: plans of ladders that run in this one's stem (a vision tower), by the module's name; their names are relative
        to it. Their layers are units like ours, and nothing of ours is said of what they hold. They are called as
        modules, by all ranks alike, and live on the first pipeline stage. What they return is used, and reaches each of
        their weights, also where it has no rows: FSDP waits for gradients. Context parallelism leaves their tokens
        whole, and shares items where `share` is named.
    share, collect: of an inner ladder, where its two seams are (see `Ladder`). Empty: each rank computes all of it.
    merge: rows of an item at `share` that are one at `collect`.

    A pattern that matches nothing is an error, because a misspelt name would silently be rounded.
    """

    layers: tuple[str, ...]
    keep_fp32: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    tokens: Mapping[str, int] = field(default_factory=dict)
    split: str = "split"
    core: str = "core"
    gather: str = "gather"
    heads: int | Mapping[str, int] = 0
    head_dim: int = 0
    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()
    losses: str = "token_losses"
    logits: str = "token_logits"
    companions: Mapping[str, int] = field(default_factory=dict)
    residual: str = "x"
    inner: Mapping[str, "ParallelPlan"] = field(default_factory=dict)
    share: str = ""
    collect: str = ""
    merge: int = 1

    def ladders(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, "ParallelPlan"]]:
        """(prefix of its names, module, plan) of every ladder in the model: the inner ones first, as they run first."""
        for name, plan in self.inner.items():
            for prefix, ladder, own in plan.ladders(model.get_submodule(name)):
                yield f"{name}.{prefix}", ladder, own
        yield "", model, self

    def on(self, model: nn.Module) -> "ParallelPlan":
        """The plan of a part of its model: without the patterns that mean nothing that is there."""
        modules, parameters = self._modules(model), self._parameters(model)
        kept: dict[str, Any] = {
            "keep_fp32": tuple(p for p in self.keep_fp32 if any(fnmatchcase(name, p) for name in parameters)),
            "inner": {name: plan for name, plan in self.inner.items() if name in dict(model.named_modules())},
        }
        for kind in ("layers", "columns", "rows", "norms", "vocabulary"):
            kept[kind] = tuple(p for p in getattr(self, kind) if any(_match_parts(name, p) for name in modules))
        return replace(self, **kept)

    def check(self, model: nn.Module) -> None:
        """Raises ValueError for a pattern or a name that means nothing in the whole model."""
        modules = self._modules(model)
        _check_patterns(self.keep_fp32, list(self._parameters(model)), fnmatchcase, "keep_fp32", "parameter")
        for kind in ("layers", "columns", "rows", "norms", "vocabulary"):
            _check_patterns(getattr(self, kind), list(modules), _match_parts, kind, "module")
        everything = dict(model.named_modules())
        for name, plan in self.inner.items():
            if name not in everything:
                raise ValueError(f"plan.inner: the model has no module {name!r}")
            plan.check(everything[name])
        count = sum(any(_match_parts(name, pattern) for pattern in self.layers) for name in modules)
        for name, layer in self.companions.items():
            if name not in modules or not 0 <= layer < count:
                raise ValueError(
                    f"plan.companions: {name!r} with layer {layer}: the model has {count} layers, and no such module"
                )

    def units_in_order(self, model: nn.Module) -> dict[str, int]:
        """The units of sharding and recompute by name, in the order in which they run, with the number of their layer:
        layers, and before each its companions. Of this ladder only; of the whole model, also what is None in this part.
        """
        layers = [name for name in _names(model) if any(_match_parts(name, pattern) for pattern in self.layers)]
        units: dict[str, int] = {}
        for number, layer in enumerate(layers):
            units |= {name: of for name, of in self.companions.items() if of == number} | {layer: number}
        return units

    def units_of(self, model: nn.Module) -> dict[str, nn.Module]:
        """Those units that are here, in the order in which they run."""
        modules = dict(model.named_modules())
        return {name: modules[name] for name in self.units_in_order(model) if name in modules}

    def modules_of(self, model: nn.Module, kind: str) -> dict[str, nn.Module]:
        """The modules by name that the patterns of a field mean, e.g. `layers` or `columns`."""
        modules = self._modules(model)
        found = _matching(getattr(self, kind), list(modules), _match_parts, kind, "module")
        return {name: modules[name] for name in found}

    def set_seam(self, model: nn.Module, path: str, seam: object) -> None:
        """Sets an attribute that this plan names, of the model or of a module in it; ValueError where there is none.

        Nothing happens on a pipeline stage without its owner.
        """
        parent, _, name = path.rpartition(".")
        first = path.partition(".")[0]
        if first in self.last and getattr(model, first, None) is None:
            return
        try:
            owner = model.get_submodule(parent)
        except AttributeError:
            owner = None
        if not hasattr(owner, name):
            raise ValueError(f"the plan's seam {path!r} is no attribute of {type(model).__name__}")
        setattr(owner, name, seam)

    def fp32_parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of this ladder that stay in fp32, by name. Raises ValueError for a pattern without match."""
        parameters = self._parameters(model)
        found = _matching(self.keep_fp32, list(parameters), fnmatchcase, "keep_fp32", "parameter")
        return {name: parameters[name] for name in found}

    def _modules(self, model: nn.Module) -> dict[str, nn.Module]:
        return {name: module for name, module in model.named_modules() if not self._is_inner(name)}

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in model.named_parameters() if not self._is_inner(name)}

    def _is_inner(self, name: str) -> bool:
        return any(name == inner or name.startswith(f"{inner}.") for inner in self.inner)


def _names(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """As `named_modules`, which leaves out those that are None."""
    for name, child in module._modules.items():
        yield prefix + name
        if child is not None:
            yield from _names(child, f"{prefix}{name}.")


@lru_cache(maxsize=1 << 16)  # a search of layouts asks the same of a model a hundred times
def _match_parts(name: str, pattern: str) -> bool:
    names, patterns = name.split("."), pattern.split(".")
    return len(names) == len(patterns) and all(map(fnmatchcase, names, patterns))


def _matching(patterns: abc.Sequence[str], names: list[str], match: Any, field: str, kind: str) -> list[str]:
    _check_patterns(patterns, names, match, field, kind)
    return [name for name in names if any(match(name, pattern) for pattern in patterns)]


def _check_patterns(patterns: abc.Sequence[str], names: list[str], match: Any, field: str, kind: str) -> None:
    for pattern in patterns:
        if not any(match(name, pattern) for name in names):
            near = get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            raise ValueError(f"plan.{field}: no {kind} is named like {pattern!r}; there are {', '.join(near)}, …")
