"""What one run of a unit on the meta device tells: bytes, kernels, and what it refers to."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from mm_parallel.config import ParallelConfig
from mm_parallel.estimate.kernels import Kernel
from mm_parallel.meta import Sent


class Halves(NamedTuple):
    """A backward in two halves, by torch's own functions: bytes of one unit, what it has saved among them.

    The first half makes the gradients of inputs. For the second it leaves what was saved, and gradients where the way
    to a parameter parts from the way to the inputs.
    """

    after: int
    """After the first half of this unit, until that of all units has ended."""
    between: int
    """From then on until the second half: of the graph is left what this unit or those above refer to."""
    weights: int
    """Most bytes in the second half."""
    again: int
    """The same where the parameters have gradients already."""
    left: int
    """After the second half of this unit, until that of all units has ended."""
    reaches: frozenset[str]
    """The fields on whose graph, that of the units before, this one holds between the halves."""


@dataclass(frozen=True)
class UnitTrace:
    """One micro-batch through one unit, on the fullest rank. All bytes are counted; of parameters there are none."""

    saved: int
    """Bytes that live from the forward to the backward: what autograd and recompute hold of what this unit or the one
    before it made. What the stem makes for all layers is not among them.
    """
    inputs: int
    """Of `saved`, what offload="inputs" moves."""
    kept: int
    """Of `saved`, what offload="attention" moves."""
    output: int
    """Bytes that it hands on to the next unit; of the head, of its losses, which are kept until the end of the step."""
    forward: int
    """Most bytes at one time in the forward: its input, what it makes and saves, its output."""
    backward: int
    """Most bytes at one time in the backward: what is saved, what is made, gradients of its parameters among it. Of a
    backward in halves: in the first.
    """
    again: int
    """The same where the parameters have gradients already, to which others are added."""
    gradients: int
    """Bytes of gradients of its parameters, in the dtype in which it reads them."""
    holds: frozenset[str]
    """The fields of the stream that it changes nothing of, and that live until its backward, for it refers to them; of
    the stem, the model's arguments.
    """
    takes: frozenset[str]
    """Of the fields that travel, those that are in `saved` as it was given them."""
    changes: frozenset[str]
    """Of the same, those that it hands on in new memory."""
    keeps: frozenset[str]
    """Of `changes`, those that are in `saved` as it hands them on."""
    kernels: tuple[Kernel, ...] = field(repr=False)
    """Of one forward."""
    backward_kernels: tuple[Kernel, ...] = field(repr=False)
    """Of one backward, with what recompute runs again."""
    sent: tuple[Sent, ...] = field(repr=False)
    """Collectives over tensor-parallel and context ranks in one forward."""
    backward_sent: tuple[Sent, ...] = field(repr=False)
    """In one backward, with those that recompute makes again."""
    halves: Halves | None = None
    """Where the backward is split."""


class Around(NamedTuple):
    """Bytes of the stem that live while the layers of an inner ladder run."""

    forward: int
    """What it has made, with what enters the ladder."""
    backward: int
    """What waits for the rest of the stem's backward."""


class Traces(NamedTuple):
    """Of one way of cutting."""

    units: dict[str, UnitTrace]
    """By name: "stem" (with what is around the layers of inner ladders), module names of layers, "head"."""
    around: dict[str, Around]
    """By prefix of an inner ladder."""
    stream: dict[str, dict[str, tuple[int, bool]]]
    """By prefix, of each field of the stream with tensors: bytes, and whether it requires a gradient when it leaves the
    last layer.
    """
    returned: int
    """Bytes of what the model returns. In a pipeline it is in the head's `saved`, and lives until the last stage's
    backward has ended: torch's stage refers to it.
    """

    def constants(self, prefix: str, names: Iterable[str]) -> int:
        """Bytes of the fields that some of these units refer to."""
        held = frozenset[str]().union(*(self.units[name].holds for name in names))
        return sum(self.stream[prefix][name][0] for name in held)


class Way(NamedTuple):
    """What of a layout changes a unit."""

    tp: int
    ring: int
    ulysses: int
    sharded: bool
    """Whether parameters come in the dtype of the computation."""

    @property
    def ranks(self) -> int:
        return self.tp * self.ring * self.ulysses


def way_of(layout: ParallelConfig) -> Way:
    sharded = layout.dp_replicate * layout.dp_shard * layout.ring * layout.ulysses > 1
    return Way(layout.tp, layout.ring, layout.ulysses, sharded)
