"""Answers token by token, the likeliest each time: plain and slow, but under any layout.

Every new token is a whole forward of all questions, packed behind each other; nothing is cached. So a model that is
sharded, or cut over a pipeline, answers as it trains. For speed, see `mm_infer.chat`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mm_models.layers import Sequence as Tokens


class Prompt(Protocol):
    """A question, encoded: input_ids L, position_ids 3 L, pixel_values N P, grid_thw M 3."""

    input_ids: Tensor
    position_ids: Tensor
    pixel_values: Tensor
    grid_thw: Tensor


@torch.no_grad()
def greedy(
    model: Callable[..., Tensor],
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    stop_ids: Collection[int],
    device: torch.device | str = "cpu",
    banned_ids: Collection[int] = (),
) -> list[list[int]]:
    """The answers to `prompts`, each without the stop token that ended it.

    All ranks of a layout call it with the same prompts, and get the same answers.

    Args:
        model: (input_ids 1 L, position_ids 3 1 L, pixel_values N P, grid_thw (M tuples of 3), sequence) ->
            logits 1 L V.
        prompts: whose positions end with that of the last token; new tokens go on from their largest, plus 1.
        max_new_tokens: the most tokens of an answer.
        stop_ids: tokens that end an answer.
        device: where the model computes.
        banned_ids: tokens that no answer has, such as those that stand for an image.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    open_ = list(range(len(prompts)))
    while open_ and max_new_tokens > 0:
        ids, positions = zip(*(_extend(prompts[i], answers[i]) for i in open_), strict=True)
        bounds = [0]
        for one in ids:
            bounds.append(bounds[-1] + len(one))
        logits = model(
            input_ids=torch.cat(ids)[None].to(device),
            position_ids=torch.cat(positions, 1)[:, None].to(device),
            pixel_values=torch.cat([prompts[i].pixel_values for i in open_]).to(device),
            grid_thw=tuple(tuple(grid) for i in open_ for grid in prompts[i].grid_thw.tolist()),
            sequence=Tokens(bounds[-1], causal=True, segments=tuple(bounds) if len(bounds) > 2 else None),
        )
        last = logits[0, [stop - 1 for stop in bounds[1:]]]
        last[:, list(banned_ids)] = float("-inf")
        chosen = last.argmax(-1).tolist()
        for i, token in zip(open_, chosen, strict=True):
            if token not in stop_ids:
                answers[i].append(token)
        ended = {i for i, token in zip(open_, chosen, strict=True) if token in stop_ids}
        open_ = [i for i in open_ if i not in ended and len(answers[i]) < max_new_tokens]
    return answers


def _extend(prompt: Prompt, answer: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(ids L, positions 3 L) of a question and what is answered so far."""
    new = torch.tensor(answer, dtype=prompt.input_ids.dtype)
    first = prompt.position_ids.max() + 1
    places = (first + torch.arange(len(answer))).to(prompt.position_ids.dtype).expand(3, -1)
    return torch.cat([prompt.input_ids, new]), torch.cat([prompt.position_ids, places], 1)
