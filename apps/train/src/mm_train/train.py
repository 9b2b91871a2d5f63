"""The training algorithm, on one page; each line's detail is one module away."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from mm_parallel import clip_grad_norm, finish_gradients, forward_backward
from mm_train.config import Config
from mm_train.export import export_final
from mm_train.run import prepare


def train(config: Config) -> Path:
    """Run `config` to its last step and export the weights; returns the directory of the exported weights.

    Raises ValueError for a configuration that cannot work, FloatingPointError for a non-finite loss or gradient, and
    KeyboardInterrupt for a run that was stopped, after its step is saved.
    """
    with ExitStack() as held:  # the output is this run's until the weights are written
        with prepare(config, held) as run:  # every refusal, cheapest first
            for batch in run.batches():  # ends after a whole step when any rank was interrupted
                run.set_rate()
                losses = forward_backward(
                    run.model, len(batch), batch.inputs, batch.losses, batch.total, run.mesh, batch.outlines
                )
                loss = run.start_loss(losses)  # of all ranks
                finish_gradients(run.parameters, run.mesh)
                norm = clip_grad_norm(run.parameters, run.max_norm, run.mesh)
                updated = run.update(loss(), norm)  # the weights, unless a number is not finite; nobody waits so far
                step = run.outcome(batch, losses, updated)  # global numbers, alike on every rank
                if step.finite:
                    run.average.update(step.index)
                run.optimizer.zero_grad(set_to_none=True)  # not held while something else needs memory, and never saved
                run.report(step)
                run.save_if_due(step)
                run.evaluate_if_due(step)
        run.check_finished()
        return export_final(config, run.checkpoints.saved(), leader=run.rank == 0)
