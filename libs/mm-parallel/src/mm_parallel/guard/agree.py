"""Whether ranks were told the same: asked before they wait for each other."""

import hashlib
import json
import socket
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from mm_parallel.guard.diagnosis import ranks_of

ALIKE = "start all ranks with the same flags and files"
"""The way out where ranks were told different things."""

COPY = "copy the files from one host to the others, or let all read one shared folder"
"""The way out where ranks read files of other contents."""


def agree(what: Mapping[str, object], label: str, group: dist.ProcessGroup | None = None, way_out: str = "") -> None:
    """Raises ValueError on every rank of `group` (None: all) unless `what` is the same on all of them.

    what: values by name. They are compared by their `repr`, which must not depend on the process (no sets,
        no addresses). The message names the first keys that differ, the ranks with their hosts, and the values.
    way_out: what to do about it, for the message.

    All ranks call it. Costs one small collective; nothing is sent but a hash as long as all agree.
    """
    if not dist.is_initialized():
        return
    mine = {key: repr(value) for key, value in what.items()}
    if len(set(gather(hashlib.sha256(json.dumps(mine).encode()).hexdigest(), group))) == 1:
        return
    hosts, all_of_them = zip(*gather((socket.gethostname(), mine), group), strict=True)
    numbers = dist.get_process_group_ranks(group) if group is not None else range(dist.get_world_size())
    host_of = dict(zip(numbers, hosts, strict=True)) if len(set(hosts)) > 1 else {}
    different = []
    for key in dict.fromkeys(key for one in all_of_them for key in one):
        holders: dict[str, list[int]] = {}
        for number, one in zip(numbers, all_of_them, strict=True):
            holders.setdefault(one.get(key, "missing"), []).append(number)
        if len(holders) > 1:
            values = ", ".join(f"{_shorten(value)} on {_name(who, host_of)}" for value, who in holders.items())
            different.append(f"{key} is {values}")
    more = f"; and {len(different) - 5} more" if len(different) > 5 else ""
    what_differs = f"{'; '.join(different[:5]) or 'in its order'}{more}"
    raise ValueError(f"{label} differs between ranks: {what_differs}{way_out and f': {way_out}'}")


def agree_on(what: str, who: str, group: dist.ProcessGroup, device: torch.device) -> None:
    """Raises ValueError on every rank of `group`, with what each was given, unless that is the same text.

    For every step, where `agree` would be slow: 8 bytes from each rank as long as all agree. Without it a rank would
    wait for what is never sent, and gloo ends the process on a message of another size.

    who: what the ranks are, for the message. device: of the tensors that the group can send.
    """
    digest = int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], "big", signed=True)
    mine = torch.tensor([digest], device=device)
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    if len(set(torch.cat(everyone).tolist())) == 1:
        return
    holders: dict[str, list[int]] = {}
    for rank, text in zip(dist.get_process_group_ranks(group), gather(what, group), strict=True):
        holders.setdefault(text, []).append(rank)
    given = "; ".join(f"{ranks_of(ranks)}: {text}" for text, ranks in holders.items())
    raise ValueError(f"{who} must be given the same, but have {given}")


def check_alike(
    configuration: Mapping[str, object],
    releases: Mapping[str, str],
    read: Callable[[], Mapping[str, Mapping[str, str]]],
) -> str:
    """Raises ValueError, naming ranks and hosts, unless all ranks were told the same, have the same libraries, and see
    the same files. All ranks call it.

    configuration: values by their flags. releases: of libraries, by name. read: gives the identities of files, by flag
        and name; where it raises ValueError or OSError on one rank, those of others may be right.
    """
    agree(configuration, "the configuration", way_out=ALIKE)
    agree(releases, "the release of a library", way_out="install the same on all hosts")
    try:
        contents = {f"--{flag} {name}": found for flag, those in read().items() for name, found in those.items()}
    except (ValueError, OSError) as error:
        contents = {"what cannot be read": str(error)}
    agree(contents, "what is read", way_out=COPY)
    return f"they see the same configuration, libraries and {len(contents):,} files"


def gather(mine: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """What each rank has, in their order."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group)
    return everyone


def _name(ranks: list[int], host_of: Mapping[int, str]) -> str:
    """`ranks 0, 1 (host a)`, where there are several hosts."""
    hosts = list(dict.fromkeys(host_of[rank] for rank in ranks if rank in host_of))
    more = f" and {len(hosts) - 3} more" if len(hosts) > 3 else ""
    return ranks_of(ranks) + (f" ({', '.join(hosts[:3])}{more})" if hosts else "")


def _shorten(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"
