"""The micro-batches of one optimizer step: what the model is called with, and how its outputs become losses."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mm_data import Batch, Step
from mm_data.random import generator
from mm_models.objective import Objective


class MicroBatches:
    """One step of this rank, as `mm_parallel.forward_backward` asks for it: `len`, `inputs(i)`, `losses(output, i)`.

    A pipeline asks for inputs on its first stage and for losses on its last. Draws are counter-based, by (seed, epoch,
    sample): the same sample of the same epoch is trained on alike whatever the rank, the micro-batch or the number of
    restarts. So they are made where they are needed.
    """

    def __init__(
        self,
        step: Step,
        objective: Objective,
        seed: int,
        device: torch.device,
        before: Callable[[int], None] = lambda number: None,
    ):
        """before: called with the number of a micro-batch before its inputs are made."""
        self.step, self.objective, self.seed, self.device, self.before = step, objective, seed, device, before
        self.micro: Sequence[Batch] = step.micro
        self._drawn: dict[int, Any] = {}
        self.total = 0.0
        """The weight of the whole step, over all ranks. Set by whoever knows it."""

    def __len__(self) -> int:
        return len(self.micro)

    def weigh(self) -> Tensor:
        """The weight of this rank's samples, a scalar on the CPU."""
        return sum(self.objective.weigh(batch.tensors).double().sum() for batch in self.micro)

    def digest(self) -> int:
        """Of which samples this rank has: a file that does not open is left out, see `ConversationDataset`."""
        names = repr([batch.ids for batch in self.micro]).encode()
        return int.from_bytes(hashlib.blake2b(names, digest_size=7).digest(), "big")

    def count(self) -> dict[str, float]:
        """What this rank's batches hold, by the names of `Objective.count`."""
        counts = [self.objective.count(batch.tensors) for batch in self.micro]
        return {name: sum(one[name] for one in counts) for name in counts[0]}

    def inputs(self, number: int) -> dict[str, Any]:
        """What the model is called with, by name."""
        self.before(number)
        return self.objective.inputs(self._tensors(number), self._draw(number))

    @property
    def outlines(self) -> Callable[[int], dict[str, Any]] | None:
        """For a pipeline whose micro-batches differ: the inputs without their values, so that nothing moves.

        None where the model asks for no values, and all micro-batches are alike.
        """
        if not self.objective.host:
            return None
        nowhere = torch.device("meta")
        return lambda number: self.objective.inputs(
            OnDevice(self.micro[number].tensors, nowhere, self.objective.host), None
        )

    def losses(self, output: Tensor, number: int) -> Tensor:
        """The weighted loss of every sample: B, float32."""
        losses = self.objective.losses(output, self._tensors(number), self._draw(number))
        del self._drawn[number]
        return losses

    def _tensors(self, number: int) -> Mapping[str, Tensor]:
        return OnDevice(self.micro[number].tensors, self.device, self.objective.host)

    def _draw(self, number: int) -> Any:
        if number not in self._drawn:
            batch = self.micro[number]

            def generators(i: int, purpose: str) -> torch.Generator:
                return generator(self.seed, batch.epochs[i], batch.ids[i], purpose)

            self._drawn[number] = self.objective.draw(batch.tensors, generators)
        return self._drawn[number]


class OnDevice(Mapping[str, Tensor]):
    """Tensors that move when they are asked for: losses need the latents alone. Those of `host` never do."""

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device, host: Sequence[str]):
        self.tensors, self.device, self.host = tensors, device, host

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name] if name in self.host else self.tensors[name].to(self.device)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors  # and nothing moves

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def seed_dropout(*place: int) -> None:
    """Seeds the only ambient draw there is, the adapters' dropout, by (seed, step, ranks of data and context,
    micro-batch).
    """
    torch.manual_seed(int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=7).digest(), "big"))
