"""A vocabulary cut over tensor-parallel ranks: the embedding, the logits and the losses of tokens.

Rank r of R has the rows r V/R … (r+1) V/R of a weight V D, and computes the logits of these tokens alone. Nobody holds
all logits of a row: ranks send each other two numbers for each label, the log-sum-exp of their part and, from the rank
that has it, the label's logit. In the backward they sum the gradient of x once.

Logits are made in chunks of rows, used and dropped, and made again in the backward: a third product with the weight
takes the place of n x V/R numbers. Rows without a label are left out of all of it.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mm_parallel.collectives import Enter, Leave, local_part, sum_over
from mm_parallel.context.shard import join

NO_LABEL = -100
LOGITS = 2**26
"""Of one chunk, at most: 256 MiB in float32."""


def embed(tokens: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The rows of a weight V D, of which each rank has a part, for tokens of any shape: … -> … D, the same on all."""
    part = local_part(weight)
    row, ours = _locate(tokens, len(part), group)
    return Leave.apply(F.embedding(row, part) * ours[..., None], group)


def token_logits(x: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x weightᵀ of all tokens: B L D, V D -> B L V, the same on all ranks."""
    return _Join.apply(F.linear(Enter.apply(x, group), local_part(weight, x.dtype)), group)


def token_losses(x: Tensor, weight: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Cross-entropy of every token that has a label: B L D, V D, B L -> B L, at least float32; elsewhere 0.

    labels: -100 is none. The same x and labels on all ranks, and the same result. Products are made in the dtype of x,
    everything else in at least float32. Raises ValueError for a label that is no token.
    """
    part = local_part(weight)
    rows = (labels != NO_LABEL).nonzero(as_tuple=True)
    wanted, size = labels[rows], len(part) * group.size()
    if len(wanted) and not 0 <= int(wanted.min()) <= int(wanted.max()) < size:
        raise ValueError(
            f"labels are {int(wanted.min())} … {int(wanted.max())}, but the vocabulary has {size} tokens: 0 … "
            f"{size - 1}, or {NO_LABEL} for none"
        )
    found = _Losses.apply(x[rows], part, wanted, group)
    return found.new_zeros(labels.shape).index_put(rows, found)


def cut_embedding(embedding: nn.Embedding, group: dist.ProcessGroup) -> None:
    """Lets it look tokens up on the ranks that have them."""
    embedding.forward = lambda tokens: embed(tokens, embedding.weight, group)


def cut_head(linear: nn.Linear, group: dist.ProcessGroup) -> None:
    """Lets it return the logits of all tokens."""
    linear.forward = lambda x: token_logits(x, linear.weight, group)


def _locate(tokens: Tensor, size: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Where in this rank's part tokens are, and whether they are there (elsewhere: 0, False)."""
    row = tokens - group.rank() * size
    ours = (row >= 0) & (row < size)
    return row.where(ours, 0), ours


class _Join(torch.autograd.Function):
    """Parts of the last dim, in the order of the ranks. What follows is the same on all, and so is its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.place, size = group.rank() * x.shape[-1], x.shape[-1]
        ctx.size = size
        return join(x, x.ndim - 1, [[(i * size, (i + 1) * size)] for i in range(group.size())], group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.narrow(-1, ctx.place, ctx.size), None


class _Losses(torch.autograd.Function):
    """x n D, this rank's part v D of the weight, labels n -> n."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
        row, ours = _locate(labels, len(weight), group)
        wide, cast = torch.promote_types(x.dtype, torch.float32), weight.to(x.dtype)
        parts = x.new_zeros((2, len(x)), dtype=wide)  # log-sum-exp; the logit of the label
        for here in _chunks(x, weight):
            logits = _multiply(x[here], cast.T, wide)
            parts[0, here] = logits.logsumexp(-1)
            parts[1, here] = logits.gather(-1, row[here, None])[:, 0] * ours[here]
        if len(x):
            everyone = [torch.empty_like(parts) for _ in range(group.size())]
            dist.all_gather(everyone, parts, group=group)
            whole = torch.stack(everyone)
            parts = torch.stack((whole[:, 0].logsumexp(0), whole[:, 1].sum(0)))
        ctx.save_for_backward(x, weight, row, ours, parts[0])
        ctx.group = group
        return parts[0] - parts[1]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, row, ours, whole = ctx.saved_tensors
        wide, cast = grad.dtype, weight.to(x.dtype)
        for_x, for_weight = ctx.needs_input_grad[:2]
        grad_x = torch.zeros_like(x) if for_x else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if for_weight else None
        for here in _chunks(x, weight):
            part = (_multiply(x[here], cast.T, wide) - whole[here, None]).exp_()  # softmax
            part.scatter_add_(-1, row[here, None], -ours[here, None].to(wide))
            part = part.mul_(grad[here, None]).to(x.dtype)
            if for_x:
                grad_x[here] = part @ cast
            if for_weight:
                grad_weight += _multiply(part.T, x[here], wide)
        if for_x and len(x):
            grad_x = sum_over(grad_x, ctx.group)
        return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def _multiply(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """a @ b in a wider dtype than theirs, without rounding in between where the device can do that."""
    if a.dtype != wide and a.is_cuda:
        return torch.mm(a, b, out_dtype=wide)
    return (a @ b).to(wide)


def _chunks(x: Tensor, weight: Tensor) -> Iterator[slice]:
    size = max(1, LOGITS // len(weight))
    return (slice(start, start + size) for start in range(0, len(x), size))
