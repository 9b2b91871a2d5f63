"""Everything that a run needs, before it is launched: ``python -m mm_train.doctor``, with the flags of the run.

It starts nothing and writes nothing. Exit code 0: all checks hold; 2: one fails.
Under torchrun every rank looks, and what differs is told with its ranks and hosts.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from mm_convert.cli.arguments import dump
from mm_convert.cli.checks import Check, Finding, NotHere, Table, find
from mm_convert.cli.terminal import escaped_output
from mm_models.libraries import installed
from mm_parallel.launch import read_launch
from mm_train.checks import CHECKS, Asked
from mm_train.command import run
from mm_train.config import Config
from mm_train.recipe import load_config

RANKS = "ranks"
"""The check of what all of them see, which needs all of them at once."""


@dataclass
class DoctorConfig(Config):
    """Look at all that a training run needs, with the flags of the run. Nothing is started, and nothing is written."""

    world: Annotated[int, ">= 1"] | None = None
    """Ranks that the run will have; by default those that torchrun has started, or one."""


def examine(config: Config, world: int | None = None) -> Iterator[Finding]:
    """What each check finds on this rank, in their order."""
    return find(CHECKS, Asked(config, world))


def examine_ranks(config: Config, own: Sequence[Finding], patience: float) -> list[Finding]:
    """What all ranks have found, each check once; and whether they see the same. All ranks call it."""
    import torch.distributed as dist

    from mm_parallel.guard import join

    with join(deadline=patience) as guard:
        guard.at("looking", patience)
        world, rank = dist.get_world_size(), dist.get_rank()
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, (socket.gethostname(), list(own)))
        together = [_merge(everyone, number) for number in range(len(own))]
        guard.at("comparing files", patience)
        alike = next(find([Check(RANKS, "when asked", lambda config: _compare(config, world))], config))
        dist.barrier()
    return [*together, alike] if rank == 0 else [*own, alike]


def _merge(everyone: Sequence[tuple[str, Sequence[Finding]]], number: int) -> Finding:
    """One check of all ranks: what the first one says, or those that fail with their ranks and hosts."""
    from mm_parallel.guard.diagnosis import ranks_of

    found = [(rank, host, findings[number]) for rank, (host, findings) in enumerate(everyone)]
    by_text: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for rank, host, finding in found:
        by_text.setdefault((finding.state, finding.text), []).append((rank, host))
    first = found[0][2]
    failing = {text: who for (state, text), who in by_text.items() if state == "fails"}
    if not failing or len(by_text) == 1:
        return first
    told = []
    for text, who in failing.items():
        hosts = ", ".join(dict.fromkeys(host for _, host in who))
        told.append(f"on {ranks_of([rank for rank, _ in who])} ({hosts}): {text}")
    return Finding(first.name, "fails", "; ".join(told), first.notes)


def _compare(config: Config, world: int) -> str:
    """Raise ValueError, naming ranks and hosts, unless all see the same configuration, releases and files."""
    from mm_parallel.guard import agree
    from mm_parallel.guard.agree import COPY
    from mm_train.contents import read_contents

    agree(dump(config), "the configuration")
    agree(installed(), "the release of a library", way_out="install the same on all hosts")
    try:
        contents = {
            f"--{flag} {name}": it for flag, those in read_contents(config).items() for name, it in those.items()
        }
    except (ValueError, OSError) as error:  # those of another rank may be right
        contents = {"what cannot be read": str(error)}
    agree(contents, "what is read", way_out=COPY)
    return f"{world} see the same configuration, libraries and {len(contents):,} files"


def show(findings: Iterator[Finding] | Sequence[Finding]) -> int:
    """Print them as they come. Returns the exit code."""
    table = Table(sys.stdout, [*(one.name for one in CHECKS), RANKS])
    for finding in findings:
        table.add(finding)
    return table.end()


def _alone(config: DoctorConfig) -> Iterator[Finding]:
    yield from examine(config, config.world)
    said = NotHere("one process: under torchrun, all ranks compare configuration, libraries and files")
    yield Finding(RANKS, "not here", said)


@escaped_output()
def main(argv: list[str] | None = None) -> None:
    def read() -> DoctorConfig:
        launch = read_launch()
        config = load_config(argv, DoctorConfig, "python -m mm_train.doctor")
        if config.world is not None and launch.joins and config.world != launch.world:
            raise ValueError(
                f"--world {config.world}, but torchrun has started {launch.world} ranks: leave it out, or start one "
                "process without torchrun"
            )
        return config

    def work(config: DoctorConfig) -> None:
        if not read_launch().joins:
            sys.exit(show(_alone(config)))
        from mm_parallel.device import leave  # torch, only now

        own = list(examine(config))
        findings = examine_ranks(config, own, config.patience)
        code = show(findings) if read_launch().rank == 0 else 2 if any(f.state == "fails" for f in findings) else 0
        leave()
        sys.exit(code)

    run(read, work)


if __name__ == "__main__":
    main()
