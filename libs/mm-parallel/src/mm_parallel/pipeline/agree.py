"""Whether the ranks of a pipeline are about to do the same."""

import hashlib
from collections import defaultdict

import torch
import torch.distributed as dist


def agree(what: str, group: dist.ProcessGroup, device: torch.device) -> None:
    """Raises ValueError on every rank of the group if they do not all say the same; else costs 8 bytes each.

    Without it a rank would wait for what is never sent, and gloo ends the process on a message of another size.
    """
    digest = int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], "big", signed=True)
    mine = torch.tensor([digest], device=device)
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    if len(set(torch.cat(everyone).tolist())) == 1:
        return
    told: list[str] = [""] * group.size()
    dist.all_gather_object(told, what, group=group)
    ranks = defaultdict(list)
    for rank, words in zip(dist.get_process_group_ranks(group), told, strict=True):
        ranks[words].append(str(rank))
    lines = [f"  rank{'s' * (len(who) > 1)} {', '.join(who)}: {words}" for words, who in ranks.items()]
    raise ValueError("\n".join(["the ranks of a pipeline must be given the same, but have", *lines]))
