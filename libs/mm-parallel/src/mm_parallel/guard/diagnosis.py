"""Whom to name when ranks fail or stop: from an error, from where threads are, from heartbeats."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from mm_parallel.device import BACKENDS

_TORCH = str(Path(torch.__file__).parent)


def comes_from_another(error: BaseException) -> bool:
    """Whether an error looks like the loss of another rank. If it does not mean that, it is told a little later."""
    text = str(error).lower()
    words = ("connection", "peer", "socket", "broken pipe", "timed out", "timeout", *BACKENDS)
    return isinstance(error, dist.DistError) or any(word in text for word in words)


def position(frame: FrameType | None) -> tuple[str, bool]:
    """Where a thread is, and whether that is in torch's collectives."""
    if frame is None:
        return "nowhere", False
    waits = frame.f_code.co_filename.startswith((f"{_TORCH}/distributed", f"{_TORCH}/_ops"))
    inner = _line(frame)
    outer: FrameType | None = frame
    while outer is not None and outer.f_code.co_filename.startswith(_TORCH):
        outer = outer.f_back
    return inner if outer is None or outer is frame else f"{inner} called by {_line(outer)}", waits


def _line(frame: FrameType) -> str:
    return f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


def who_hangs(
    earlier: Mapping[int, Mapping[str, Any]],
    beats: Mapping[int, Mapping[str, Any]],
    world: int,
    waited: float,
    late: float,
) -> str:
    """Of ranks without progress, those without heartbeat for `late` seconds (stopped, say); else those that are behind;
    else those that are not in a collective, as others are.

    earlier, beats: what ranks had told, and what they tell `late` seconds later.
    """
    missing = [rank for rank in range(world) if rank not in beats]
    done = [rank for rank in beats if beats[rank]["done"]]
    running = [rank for rank in beats if not beats[rank]["done"]]
    behind = [rank for rank in running if beats[rank]["number"] == min(beats[r]["number"] for r in running)]
    active = [rank for rank in running if not beats[rank]["waits"]]
    silent = [rank for rank in running if beats[rank] == earlier.get(rank)]
    culprits, what = running, "hang"
    if missing:
        culprits, what = missing, "never began"
    elif silent:
        culprits, what = silent, f"gave no sign of life for {late:.0f} s (stopped?)"
    elif len(behind) < len(running):
        culprits = behind
    elif done and not active:
        culprits, what = done, "ended before the others"
    elif 0 < len(active) < len(running):
        culprits = active
    if what == "hang" and len(culprits) == 1:
        what = "hangs"
    places: dict[str, list[int]] = {}
    for rank in sorted(running, key=lambda rank: rank not in culprits):
        places.setdefault(beats[rank]["at"], []).append(rank)
    where = "; ".join(f"{ranks_of(who)} in {at}" for at, who in list(places.items())[:8])
    return f"{ranks_of(culprits)} {what}: no progress for {waited:.1f} s, {where}"


def ranks_of(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"rank{'s' * (len(numbers) > 1)} {shown}"
