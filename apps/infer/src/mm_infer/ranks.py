"""Which part of the work is this rank's: other prompts, another pass of guidance, other tokens."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mm_convert import lock_output
from mm_infer.config import Ranks
from mm_parallel import ParallelConfig, make_mesh
from mm_parallel.device import device, leave
from mm_parallel.guard import Watchdog, join

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """Teams x passes x tokens, neighbours in the last."""

    prompts: tuple[int, int] = (0, 1)  # every which prompt is ours: first, step
    mesh: DeviceMesh | None = None  # of ranks that share the tokens, or None
    pair: dist.ProcessGroup | None = None  # of two ranks that each make one pass of guidance
    team: dist.ProcessGroup | None = None  # of all ranks that make the same video
    leads: bool = True  # the rank of a team that decodes and writes

    def decide(self, choose: Callable[[], T]) -> T:
        """What the leading rank of a team chooses, on all of it; also if it is an error."""
        if self.team is None:
            return choose()
        made: list = [None, None]
        if self.leads:
            try:
                made[0] = choose()
            except (ValueError, OSError) as error:
                made[1] = error
        dist.broadcast_object_list(made, group_src=0, group=self.team)
        if made[1] is not None:
            raise made[1]
        return made[0]


def claim_output(folder: Path, held: ExitStack) -> None:
    """Make the folder, keep it for these ranks until `held` is left, and remove what a killed run was writing there.

    Raises ValueError on every rank when another run has it (see `mm_convert.lock_output`), OSError when it cannot be
    written.
    """

    def claim() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if held.enter_context(lock_output(folder)):
            for leftover in folder.glob(".tmp-*.mp4"):
                leftover.unlink()

    world = Share(team=dist.group.WORLD, leads=dist.get_rank() == 0) if dist.is_initialized() else Share()
    world.decide(claim)


@contextmanager
def distributed(deadline: float) -> Iterator[tuple[int, Watchdog]]:
    """Joins torchrun's ranks, yields this one's number and their watchdog, and leaves the process group in the end.

    deadline: seconds that a step of a video may take.
    """
    joined = dist.is_initialized()
    with join(deadline=deadline) as guard:
        yield dist.get_rank() if dist.is_initialized() else 0, guard
    if not joined:  # and not after an error, or it would wait for ranks that are gone
        leave()


def count_ranks(ranks: Ranks, world: int) -> int:
    """How many of `world` ranks share the tokens of a video. ValueError for numbers that do not fit."""
    layout = _layout(ranks).resolve(world)
    tokens = layout.ring * layout.ulysses
    if world % (tokens * ranks.guidance):
        need = tokens * ranks.guidance
        raise ValueError(
            f"parallel.guidance {ranks.guidance} x {tokens} context ranks are {need} ranks per video, and {world} were "
            f"started: start a multiple of {need} (torchrun --nproc_per_node {need})"
        )
    return tokens


def _layout(ranks: Ranks) -> ParallelConfig:
    return ParallelConfig(cp=ranks.cp, ulysses=ranks.ulysses, ring=ranks.ring)


def share(ranks: Ranks) -> Share:
    """This rank's share of the work. ValueError for numbers that do not fit the ranks that were started."""
    kind = device().type
    world = dist.get_world_size() if dist.is_initialized() else 1
    tokens = count_ranks(ranks, world)
    mesh = make_mesh(_layout(ranks), kind)
    if mesh is None:
        return Share()
    teams = world // (tokens * ranks.guidance)
    grid = init_device_mesh(kind, (teams, ranks.guidance, tokens), mesh_dim_names=("team", "pass", "tokens"))
    team = grid["pass", "tokens"]._flatten("members")
    return Share(
        prompts=(grid.get_local_rank("team"), teams),
        mesh=mesh if tokens > 1 else None,
        pair=grid.get_group("pass") if ranks.guidance > 1 else None,
        team=team.get_group() if team.size() > 1 else None,
        leads=team.get_local_rank() == 0,
    )
