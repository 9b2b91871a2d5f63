"""Attention over a ring of ranks as one op: every rank holds some tokens, keys and values travel.

Recompute can keep the op's result like that of plain attention, and then nothing travels a second time.

In step s a rank has the keys and values of the rank s places before it, and sends them on while it computes. Partial
results are merged by their log-sum-exp. In the backward, keys and values go round again, and the gradients of
each block travel behind it, one hop more, so that they end where the block lives.

Fewer heads of keys than of queries travel as they are.

Causal: the sequence is 2R chunks, and rank r of R holds chunks r and 2R-1-r. In every step but the first, half of all
pairs of its queries and the visiting keys are then to do: all queries and the first chunk of an earlier rank, or the
second chunk's queries and all keys of a later one. All ranks work alike.

Packed samples: the chunks are those of the whole sequence, and a sample may be cut anywhere. What a rank holds of one
is in one place, even if causal: a sample with tokens in both chunks holds all that is between. So step 0 is an
attention of packed samples, the parts that are here. In every other step at most one sample has tokens on both ranks
of which some see others: the one that lasts from the earlier chunk to the later. Its queries and keys are one call of
the kernel, and without such a sample there is nothing to do. Keys travel whole.

Masked: keys and values travel whole, and every rank leaves out the masked ones of the block that has come. A rank may
hold none that are seen, its own in step 0 among them: then nothing is merged.

Elements that a rank sends per attention (n: of its own k; accumulators are at least fp32):
    forward    2 n (R-1)                    of q's dtype
    backward   2 n (R-1) of q's dtype  +  2 n R of the accumulators
(for uneven blocks: of the blocks that pass by).
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from mm_parallel.attention.around import call
from mm_parallel.attention.dispatch import backward, forward
from mm_parallel.attention.op import backend_of, check, check_mask, check_segments, complete, named, parting, scale_of


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    group: dist.ProcessGroup,
    causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
    mask: Tensor | None = None,
    segments: tuple[int, ...] | None = None,
) -> Tensor:
    """Softmax attention over the tokens of all ranks of `group`, differentiable: B L H h of this rank's tokens.

    k and v: B L K h, where K divides H.
    lengths: tokens of each rank, in order; if causal, of each of the 2R chunks of the sequence, in order: this rank
    then holds chunk r and behind it chunk 2R-1-r. mask: of the keys of all ranks, in order. segments: where packed
    samples part, in the whole sequence. Other arguments and errors as in `attention`.
    """
    check(q, k, v, causal)
    check_mask(mask, q, sum(lengths), causal, segments)
    if segments is not None:
        check_segments(segments, sum(lengths))
    rest = named(backend), list(lengths), group.group_name, mask, parting(segments)
    return call(_op, q, k, v, scale_of(q) if scale is None else scale, causal, *rest)[0]


class _Passing:
    """A tensor on its way to the next rank, and the one that comes from the rank before."""

    def __init__(self, sent: Tensor, received: Tensor, ring: "_Ring") -> None:
        self.sent, self.received = sent, received  # kept alive until both have gone
        after, before = (ring.rank + 1) % ring.size, (ring.rank - 1) % ring.size
        moves = [(dist.isend, sent, after), (dist.irecv, received, before)]
        # a rank without tokens sends nothing; who receives knows it, too
        ops = [dist.P2POp(f, x, group=ring.group, group_peer=peer) for f, x, peer in moves if x.numel()]
        self.works = dist.batch_isend_irecv(ops) if ops else []

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.received


class _Work(NamedTuple):
    """Queries and keys of which all see all, or which are causal or packed samples, or masked."""

    queries: slice
    keys: slice
    causal: bool
    mask: Tensor | None
    segments: Sequence[int] | None


class _Ring:
    """Who has what, when."""

    def __init__(
        self, lengths: Sequence[int], causal: bool, group: str, mask: Tensor | None, segments: Sequence[int] | None
    ) -> None:
        self.group = _resolve_process_group(group)
        self.rank, self.size = self.group.rank(), self.group.size()
        self.causal = causal
        assert len(lengths) == self.size * (1 + causal), (lengths, self.size, causal)
        # causal: the first and the second chunk of each rank
        self.first = list(lengths[: self.size])
        self.second = list(lengths[self.size :][::-1]) if causal else [0] * self.size
        self.starts = [0, *accumulate(lengths)]  # of the pieces in the sequence, and behind them its end
        self.ends = [0, self.starts[-1]] if segments is None else segments  # of samples
        # of our own keys
        self.segments = None if segments is None else parting(sorted({self.held(self.rank, end) for end in segments}))
        # of each rank's keys; on the host, where lengths are asked for
        self.masks = [None] * self.size if mask is None else mask.cpu().split(self.first, 1)

    def backend_of(self, q: Tensor, k: Tensor, backend: str, mask: Tensor | None) -> str:
        """One for all steps: a packed sample may be cut anywhere, and a step be of few tokens, which not all take."""
        parts = [n for n in (*self.first, *self.second) if n]
        segments = self.ends if len(self.ends) > 2 else None
        return backend_of(q, k, backend, mask, segments, keys=min(parts, default=0))

    def steps(self) -> Iterator[tuple[int, bool]]:
        """In every step, whose keys and values are here, and whether it is the last."""
        for step in range(self.size):
            yield (self.rank - step) % self.size, step == self.size - 1

    def held(self, rank: int, end: int) -> int:
        """How many of the sequence's tokens before `end` a rank holds."""
        first = min(max(end - self.starts[rank], 0), self.first[rank])
        return first + min(max(end - self.starts[-2 - rank], 0), self.second[rank])

    def work(self, source: int) -> _Work | None:
        """What to compute with the keys of rank `source`; None if nobody here sees any of them."""
        first, everything = self.first[source], self.first[source] + self.second[source]
        if source == self.rank:
            own = slice(0, everything)
            return _Work(own, own, self.causal, self.masks[source], self.segments)
        # where the piece that is seen is nearest to the one that sees: the sample there is the one that may be in both
        if source < self.rank:
            piece, token, queries, keys = first, self.starts[source] + first - 1, 0, first
        elif self.causal:
            piece, token = self.second[self.rank], self.starts[-2 - self.rank]
            queries, keys = self.first[self.rank], everything
        else:
            piece, token, queries, keys = first, self.starts[source], 0, first
        if not piece:
            return None
        sample = bisect_right(self.ends, token)
        start, stop = self.ends[sample - 1 : sample + 1]
        seeing = slice(max(queries, self.held(self.rank, start)), self.held(self.rank, stop))
        seen = slice(self.held(source, start), min(keys, self.held(source, stop)))
        if seeing.start >= seeing.stop or seen.start >= seen.stop:
            return None
        return _Work(seeing, seen, False, self.masks[source], None)

    def pass_on(self, x: Tensor, source: int) -> _Passing:
        """Starts to send x, which belongs to tokens of rank `source` (K B L H h), and to receive what comes."""
        kinds, samples, _, *heads = x.shape
        before = (source - 1) % self.size
        received = x.new_empty((kinds, samples, self.first[before] + self.second[before], *heads))
        return _Passing(x, received, self)


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Adds to out (B L H h) and lse (B H L), in place, what other keys give."""
    weight = torch.sigmoid(part_lse - lse).masked_fill(part_lse == float("-inf"), 0)  # also where lse is -inf, too
    out.lerp_(part.to(out.dtype), weight.transpose(1, 2)[..., None])
    lse.copy_(torch.logaddexp(lse, part_lse))


@torch.library.custom_op("mm_parallel::ring_attention", mutates_args=())
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    backend: str,
    lengths: Sequence[int],
    group: str,
    mask: Tensor | None = None,
    segments: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    ring = _Ring(lengths, causal, group, mask, segments)
    backend = ring.backend_of(q, k, backend, mask)
    kv = torch.stack((k, v))
    out, lse = None, None
    for source, at_end in ring.steps():
        passing = None if at_end else ring.pass_on(kv, source)
        if work := ring.work(source):
            queries, keys, diagonal, seen, samples = work
            part, part_lse = forward(q[:, queries], *kv[:, :, keys], scale, diagonal, backend, seen, samples)
            if out is None:  # step 0, our own keys
                out, lse = part.to(part_lse.dtype), part_lse
            else:
                _merge(out[:, queries], lse[:, :, queries], part, part_lse)
        if passing:
            kv = passing.wait()
    return out.to(q.dtype), lse


@torch.library.custom_op("mm_parallel::ring_attention_backward", mutates_args=())
def _op_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    backend: str,
    lengths: Sequence[int],
    group: str,
    mask: Tensor | None = None,
    segments: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    ring = _Ring(lengths, causal, group, mask, segments)
    backend = ring.backend_of(q, k, backend, mask)
    kv, dq = torch.stack((k, v)), torch.zeros_like(q, dtype=lse.dtype)
    behind = None  # the gradients of kv, so far
    for source, at_end in ring.steps():
        passing = None if at_end else ring.pass_on(kv, source)
        work, parts = ring.work(source), ()
        if work:
            queries, keys, diagonal, seen, samples = work
            given = dout[:, queries], q[:, queries], *kv[:, :, keys], out[:, queries], lse[:, :, queries]
            part, *parts = backward(*given, scale, diagonal, backend, seen, samples)
            dq[:, queries] += part
        dkv = behind.wait() if behind else torch.zeros_like(kv, dtype=lse.dtype)
        for whole, own in zip(dkv, parts):  # noqa: B905 (without work there are none)
            whole[:, work.keys] += own
        behind = ring.pass_on(dkv, source)
        if passing:
            kv = passing.wait()
    dk, dv = behind.wait()
    return dq.to(q.dtype), dk.to(k.dtype, copy=True), dv.to(v.dtype, copy=True)


complete(_op, _op_backward)
