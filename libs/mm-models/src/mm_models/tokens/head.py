"""The last step of a language model in training: from hidden states straight to the loss of each token.

Logits of all tokens are never made: 32k tokens of a vocabulary of 152k are 20 GB in float32. Rows without a label are
left out; the others are gone through in blocks of rows and of the vocabulary, once in the forward, which keeps one
number a row, and once more in the backward, which makes the logits again.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import Function

IGNORED = -100
"""The label of a token that nothing is predicted at."""
BLOCK = (2048, 16384)
"""Rows and entries of the vocabulary of which logits exist at a time: 128 MiB in float32."""


def token_losses(x: Tensor, weight: Tensor, labels: Tensor, *, chunk: tuple[int, int] = BLOCK) -> Tensor:
    """The cross entropy of each label under the logits `x @ weight.T`; 0 where the label is `IGNORED`.

    Products are taken in the dtype of x, everything else in at least float32: logsumexp, losses, sums of gradients.

    Args:
        x: B L D, hidden states after the last norm.
        weight: V D, of the head; in any dtype (float32 masters), also one that is not trained.
        labels: B L, integers in 0 … V-1, or `IGNORED`: what token i must predict. On the host or where x is.
        chunk: rows and entries of the vocabulary that are worked on at a time.

    Returns B L in float32 (float64 for float64). Without any label all are 0, and gradients are 0, not None.

    Raises:
        ValueError: a label that is no entry of the vocabulary, or shapes that do not fit.
    """
    if x.shape[:-1] != labels.shape or x.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"hidden states {tuple(x.shape)}, weight {tuple(weight.shape)} and labels {tuple(labels.shape)} do not "
            "fit: they are B L D, V D and B L"
        )
    rows, labels = find_rows(labels, weight.shape[0])
    rows, labels = rows.to(x.device), labels.to(x.device)
    flat = x.flatten(0, -2)
    losses = _TokenLosses.apply(flat.index_select(0, rows), weight, labels, chunk)
    return losses.new_zeros(len(flat)).index_put((rows,), losses).view(x.shape[:-1])


def find_rows(labels: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """(places of the labels in all of them, the labels at these places): N each. ValueError for one out of range."""
    rows = (labels.flatten() != IGNORED).nonzero()[:, 0]
    kept = labels.flatten().index_select(0, rows).long()
    if len(kept):
        low, high = (int(edge) for edge in kept.aminmax())  # the host has waited for the number of rows already
        if low < 0 or high >= vocabulary:
            wrong = low if low < 0 else high
            raise ValueError(
                f"label {wrong} is no entry of a vocabulary of {vocabulary}: labels are 0 … {vocabulary - 1}, or "
                f"{IGNORED} where nothing is to be predicted; is the tokenizer that of the model?"
            )
    return rows, kept


class _TokenLosses(Function):
    """x N D, weight V D, labels N -> losses N."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, labels: Tensor, chunk: tuple[int, int]) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        total, picked = x.new_full((len(x),), -torch.inf, dtype=wide), x.new_zeros(len(x), dtype=wide)
        for columns in _blocks(len(weight), chunk[1]):
            part = weight[columns].to(x.dtype)
            for rows in _blocks(len(x), chunk[0]):
                logits = _product(x[rows], part.T, wide)
                total[rows] = torch.logaddexp(total[rows], logits.logsumexp(1))
                inside, place = _inside(labels[rows], columns)
                picked[rows] += torch.where(inside, logits.gather(1, place[:, None])[:, 0], 0)
        ctx.save_for_backward(x, weight, labels, total)
        ctx.chunk = chunk
        return total - picked

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, labels, total = ctx.saved_tensors
        wide = total.dtype
        for_x, for_weight = ctx.needs_input_grad[:2]
        grad_x = torch.zeros_like(x, dtype=wide) if for_x else None
        grad_weight = torch.empty_like(weight) if for_weight else None
        for columns in _blocks(len(weight), ctx.chunk[1]):
            part = weight[columns].to(x.dtype)
            summed = torch.zeros_like(part, dtype=wide) if for_weight else None
            for rows in _blocks(len(x), ctx.chunk[0]):
                error = _product(x[rows], part.T, wide).sub_(total[rows, None]).exp_()
                inside, place = _inside(labels[rows], columns)
                error.scatter_add_(1, place[:, None], -inside[:, None].to(wide))
                error = error.mul_(grad[rows, None]).to(x.dtype)
                if for_x:
                    grad_x[rows] += _product(error, part, wide)
                if for_weight:
                    summed += _product(error.T, x[rows], wide)
            if for_weight:
                grad_weight[columns] = summed
        return None if grad_x is None else grad_x.to(x.dtype), grad_weight, None, None


def _blocks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _inside(labels: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """(which labels are in a part of the vocabulary, their places in it; 0 for the others): N each."""
    inside = (labels >= columns.start) & (labels < columns.stop)
    return inside, torch.where(inside, labels - columns.start, 0)


def _product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """a @ b in a wider dtype than theirs, without rounding in between where the device can do that."""
    if a.dtype != wide and a.is_cuda:
        return torch.mm(a, b, out_dtype=wide)
    return (a @ b).to(wide)
