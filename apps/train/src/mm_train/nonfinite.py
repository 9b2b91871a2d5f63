"""What happens to a loss or gradient that is not a number: the samples are named, the weights stay as they were."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from mm_data import Step
from mm_train.ranks import all_gather

MOST_IN_A_ROW = 10


class Watch:
    """Keeps which step was not finite, and decides, alike on every rank, whether to go on."""

    def __init__(self, policy: str):
        self.policy, self.reason, self.samples = policy, "", []
        self.in_a_row = 0

    def see(self, finite: bool, loss: float, norm: float, own: list[Tensor], step: Step) -> None:
        """loss and norm are global numbers; own holds this rank's loss per sample, micro-batch by micro-batch."""
        if finite:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        ids = [i for micro in step.micro for i in micro.ids]
        values = torch.cat(own).tolist() if own else [0.0] * len(ids)  # a pipeline knows them on its last stage only
        bad = [i for i, value in zip(ids, values, strict=True) if not math.isfinite(value)]
        self.reason = f"loss {loss}, gradient norm {norm}"
        # When every loss is finite and only the gradient is not, any sample of the step may be the cause.
        self.samples = list(dict.fromkeys(all_gather(bad) or all_gather(ids)))  # ranks may share samples

    def stop(self) -> bool:
        """Whether to stop; a run in which nothing is finite any more is stopped whatever the policy."""
        return self.policy == "stop" or self.in_a_row >= MOST_IN_A_ROW

    def explain(self, step: int, checkpoint: Path | None) -> str:
        """One paragraph: what, which samples, and what to do. `checkpoint` is the last that was saved."""
        shown = ", ".join(self.samples[:8]) + (f" and {len(self.samples) - 8} more" if len(self.samples) > 8 else "")
        text = f"step {step + 1} is not finite ({self.reason}); samples: {shown}"
        if not self.stop():
            return text
        way_out = "or continue without such steps by --on_nonfinite skip"
        if self.policy == "skip":
            way_out = f"as it was the last of {self.in_a_row} in a row, the model itself may be at fault"
        kept = f"saved in {checkpoint}" if checkpoint else "nothing was trained yet"
        advice = f"Look at these samples, lower --optim.lr, {way_out}"
        return f"{text}. Weights and optimizer are as before it, {kept}. {advice}"
