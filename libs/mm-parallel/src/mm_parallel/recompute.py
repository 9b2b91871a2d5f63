"""Forgetting a layer's activations in the forward and computing them again in the backward.

Three words, layer by layer: "none" keeps everything; "full" keeps the layer's input; "but_attention" keeps the input
and what attention made (out and logsumexp), so that all is computed again but attention, which is most of the work of a
long sequence. What is kept may wait on the host, see `mm_parallel.offload`.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, noop_context_fn

from mm_parallel.attention import KEPT
from mm_parallel.attention.around import Around
from mm_parallel.attention.seam import named_core
from mm_parallel.config import MemoryConfig
from mm_parallel.offload import Host, Kept, Run
from mm_parallel.plan import ParallelPlan

WORDS = ("none", "full", "but_attention")


def recompute(
    model: nn.Module, plan: ParallelPlan, memory: MemoryConfig, core_is_cut: bool = False, backend: str = "auto"
) -> None:
    """Makes layers and their companions recompute and offload as `memory` says. Gradients stay the same.

    A layer keeps its module and thereby its parameter names: only its `forward` is replaced on the instance. Its first
    argument is the stream, or the residual stream itself (see `ParallelPlan.residual`). In an inner ladder a word for
    all counts as well, a number counts its own layers (all, if it has fewer), and words for each are not for it.

    model: whole, or a pipeline rank's part of it, in which the layers of others are None.
    core_is_cut: whether context parallelism has put its attention into the model's seam. Without, "but_attention" puts
        `mm_parallel.attention.core` there, as only an op that has a name can be kept.
    backend: what computes it.

    Raises ValueError for words and numbers that the model cannot follow, and for an offload of what nobody keeps.
    """
    host, words_of = Host(), find_words(model, plan, memory)
    for prefix, ladder, own in plan.ladders(model):
        words, order = words_of[prefix], list(own.units_in_order(ladder))
        if "but_attention" in words.values() and not (core_is_cut and own.tokens):
            _name_the_core(ladder, own, backend)
        for position, (name, word) in enumerate(words.items()):
            if word != "none":
                unit = ladder.get_submodule(name)
                # the same number for units that follow each other without a gap
                run = prefix, order.index(name) - position
                unit.forward = Recomputed(unit.forward, prefix + name, word, own.residual, memory.offload, host, run)


def find_words(model: nn.Module, plan: ParallelPlan, memory: MemoryConfig) -> dict[str, dict[str, str]]:
    """By the prefix of a ladder, the word of each of its units that are here. ValueError as `recompute`."""
    words_of = {}
    for prefix, ladder, own in plan.ladders(model):
        order, units = own.units_in_order(ladder), list(own.units_of(ladder))
        here = list(dict.fromkeys(order[name] for name in units))  # numbers of this part's layers
        by_layer = choose_inner_words(memory, here) if prefix else choose_words(memory, len(set(order.values())), here)
        words_of[prefix] = {name: by_layer[order[name]] for name in units}
    _check_offload(memory.offload, _all_words(memory))
    return words_of


class Recomputed:
    """Stands for a layer's forward. An object and no closure, so that a deep copy of the model calls its own layer."""

    def __init__(
        self, forward: Callable, name: str, word: str, residual: str, offload: str, host: Host, run: Run
    ) -> None:
        self.forward, self.name, self.word, self.residual = forward, name, word, residual
        self.offload, self.host, self.run = offload, host, run

    def __call__(self, stream: Any, *args: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(stream, *args, **named)
        if isinstance(stream, Tensor):
            x, rest = stream, None
        else:
            x, rest = getattr(stream, self.residual), stream._replace(**{self.residual: None})
        del stream  # nothing here may hold on to x
        kept = self._keep("attention") if self.word == "but_attention" else None
        moves = self.offload == "inputs" and x.numel() > 0  # what is empty lies nowhere
        with _elsewhere(self._keep("inputs")) if moves else nullcontext():
            # checkpoint keeps tensors that are arguments of their own as autograd would, all else as it is
            result = checkpoint(
                self._run,
                x,
                rest,
                args,
                named,
                use_reentrant=False,
                context_fn=noop_context_fn if kept is None else lambda: (Around(_Keeping(kept)), _Answers(kept)),
            )
        if kept is not None and not kept.count and x.numel():  # without rows there may be nothing to attend to
            raise ValueError(
                f"{self.name} cannot recompute all but attention: none of {', '.join(map(str, KEPT))} ran in it; "
                'let it call the core that it is handed (see Ladder), or recompute it in "full"'
            )
        return result

    def _run(self, x: Tensor, rest: Any, args: tuple, named: dict) -> Any:
        stream = x if rest is None else rest._replace(**{self.residual: x})
        return self.forward(stream, *args, **named)

    def _keep(self, what: str) -> Kept:
        return self.host.begin_call(self.name, self.run) if self.offload == what else Kept()


class _Keeping(TorchDispatchMode):
    """In the forward: keeps what attention makes."""

    def __init__(self, kept: Kept) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if op in KEPT:  # detached, or the result would hold the graph that will hold it
            self.kept.put(tuple(part.detach() for part in result))
        return result


class _Answering(TorchDispatchMode):
    """In the backward: answers with what was kept, in the order of the forward."""

    def __init__(self, kept: Kept) -> None:
        super().__init__()
        self.kept, self.answers = kept, iter(range(kept.count))

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op in KEPT:
            return tuple(part.detach() for part in self.kept.get(next(self.answers)))
        return op(*args, **(kwargs or {}))


class _Answers(Around):
    """From the first one on whenever it is entered, as a graph may be walked twice."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept

    def __enter__(self) -> None:
        self.kept.fetch()
        self.mode = _Answering(self.kept)
        super().__enter__()


def _elsewhere(kept: Kept) -> saved_tensors_hooks:
    """Around a checkpoint: its input, which is not empty, goes where `kept` says.

    Nothing else is saved but, in some releases of torch, an empty tensor on the CPU.
    """

    def pack(x: Tensor) -> Kept | Tensor:
        if not x.numel():
            return x
        kept.put((x,))
        return kept

    def unpack(kept: Kept | Tensor) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        kept.fetch()
        return kept.get(0)[0]

    return saved_tensors_hooks(pack, unpack)


def choose_words(memory: MemoryConfig, total: int, here: list[int]) -> dict[int, str]:
    """A word for every layer that is here, by its number."""
    asked, more = memory.recompute, memory.but_attention
    if isinstance(asked, str) and asked == "none" and more:
        asked = 0
    if more and (isinstance(asked, (str, list, tuple))):
        raise ValueError(
            f"but_attention={more} counts the layers after those recomputed in full, so that recompute must be how "
            f"many these are (0 … {total}), not recompute={asked!r}: give a number"
        )
    if isinstance(asked, int) and not isinstance(asked, bool):
        if min(asked, more) < 0 or asked + more > total:
            raise ValueError(
                f"recompute={asked} and but_attention={more} layers: the model has {total}, so each must be 0 or more, "
                f"and together at most {total}"
            )
        words = ["full"] * asked + ["but_attention"] * more + ["none"] * total
        return dict(zip(here, words, strict=False))  # a stage with fewer layers than were asked for recomputes all
    if isinstance(asked, (list, tuple)):
        wrong = [word for word in asked if word not in WORDS]
        if wrong or len(asked) != total:
            raise ValueError(
                f"recompute has {len(asked)} words"
                + (f", {wrong[0]!r} among them" if wrong else "")
                + f": give one of {', '.join(WORDS)} for each of the {total} layers of the model"
            )
        return {layer: asked[layer] for layer in here}
    if asked not in WORDS:
        raise ValueError(
            f"recompute={asked!r}: give one of {', '.join(WORDS)}, how many of the {total} layers (0 … {total}), or a "
            "word for each"
        )
    return dict.fromkeys(here, asked)


def choose_inner_words(memory: MemoryConfig, here: list[int]) -> dict[int, str]:
    """A word for every layer of an inner ladder."""
    asked, more = memory.recompute, memory.but_attention
    if isinstance(asked, (list, tuple)):
        return dict.fromkeys(here, "none")
    if isinstance(asked, str) and not more:
        return dict.fromkeys(here, asked)
    words = ["full"] * (asked if isinstance(asked, int) else 0) + ["but_attention"] * more + ["none"] * len(here)
    return dict(zip(here, words, strict=False))


def _all_words(memory: MemoryConfig) -> set[str]:
    """The words that are asked for, be it for layers of other pipeline ranks: all ranks must refuse alike."""
    if isinstance(memory.recompute, str):
        words = {memory.recompute}
    elif isinstance(memory.recompute, int):
        words = {"full"} if memory.recompute else set()
    else:
        words = set(memory.recompute)
    return words - {"none"} | ({"but_attention"} if memory.but_attention else set())


def _check_offload(offload: str, words: set[str]) -> None:
    if offload not in ("none", "attention", "inputs"):
        raise ValueError(f"offload={offload!r}: there are none, attention and inputs")
    if offload == "attention" and "but_attention" not in words:
        raise ValueError(
            'offload="attention" moves what recompute="but_attention" keeps, but no layer recomputes so '
            f"({', '.join(sorted(words)) or 'none'}): set recompute or but_attention as well"
        )
    if offload == "inputs" and not words:
        raise ValueError(
            'offload="inputs" moves the inputs of recomputed layers, but no layer recomputes: set recompute'
        )


def _name_the_core(model: nn.Module, plan: ParallelPlan, backend: str) -> None:
    """Puts our attention into the seam, as one op for every device."""
    if not (plan.tokens or plan.share):
        raise ValueError(
            'recompute="but_attention" needs a plan that says where attention is: its tokens (and core) are empty; '
            'recompute in "full", or write them'
        )
    owner, _, seam = plan.core.rpartition(".")
    module = model.get_submodule(owner)
    if not hasattr(module, seam):
        raise ValueError(f'recompute="but_attention": the model has no seam {plan.core!r} to keep attention at')
    setattr(module, seam, named_core(backend))
