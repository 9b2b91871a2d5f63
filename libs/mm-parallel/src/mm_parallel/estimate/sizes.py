"""Bytes of one unit of a pipeline rank, and of the rank."""

from dataclasses import dataclass

from mm_parallel.estimate.traces import UnitTrace


@dataclass(frozen=True)
class UnitMemory:
    """One unit of a pipeline rank: stem, layer (with its companions) or head. Bytes of one micro-batch."""

    name: str
    word: str
    """What it recomputes: none, full or but_attention."""
    saved: int
    """What waits on the device for the backward, but for `shared`."""
    shared: int
    """Of what it saves, what a unit before saves too, or what is the buffer in which it was received."""
    host: int
    """What waits on the host."""
    weights: int
    """Of its parameters, gathered (this rank's tensor-parallel part of them); without FSDP as they are."""
    gathered: int
    """Of what is gathered at one time; 0 without FSDP."""
    reduced: int
    """Of the buffer in which its gradients are reduced; 0 without FSDP."""
    gradients: int
    """Of its gradients on the device: this rank's part; whole where they are reduced at the end of a step."""
    summed: int
    """Of these, what FSDP adds up apart, in the dtype in which it reduces; 0 but for `zero_bubble` with FSDP."""
    fresh: int
    """Of the same, as a backward makes them; they are there until FSDP adds them up in the next one."""
    trace: UnitTrace


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one pipeline rank, the fullest of those that share its stages.

    Parameters to average are exact; saved, stream, head and host are counted; gathered and transient are modelled of
    what is counted. With `offload_params` most of the first four are on the host, and in `host`.
    """

    rank: int
    """Pipeline rank; 0 without a pipeline."""
    parameters: int
    gradients: int
    moments: int
    average: int
    """Of an EMA."""
    gathered: int
    """At the peak: weights that FSDP has whole, gradients before they are reduced, and buffers of both; and the two
    buffers in which frozen matrices come from the host.
    """
    saved: int
    """Activations of all units and micro-batches that wait for their backward, when these are most."""
    stream: int
    """Of the same micro-batches, what the stem makes for all layers, what it is called with, and losses; in a pipeline
    also what it sends, and buffers for what it receives.
    """
    waiting: int
    """Of `parameters`, frozen matrices that wait on the host (`host_layers`); they are in `host`, too."""
    head: int
    """Logits and loss: most bytes that head, loss and their backward make; 0 before the last stage."""
    transient: int
    """At the peak: what a unit needs while it runs, or the optimizer."""
    host: int
    """On the host."""
    peak: int
    """Most bytes on the device at one time."""
    moment: str
    """When that is: "backward of blocks.39"."""
    in_flight: int
    """Micro-batches that wait for their backward at one time, when these are most; of all virtual stages."""
    layers: tuple[UnitMemory, ...]
    """All units, in the order in which they run."""
