"""Answers of the model that is trained, beside those that a held-out conversation has."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from mm_convert import replace_file
from mm_data.conversations import Unusable
from mm_data.files import shorten
from mm_models.processors import Encoded, is_exact
from mm_models.tokens import greedy
from mm_parallel import Pipeline
from mm_train.config import Config
from mm_train.held_out import HeldOut
from mm_train.optim import EMA

SHOWN = 3  # answers that are printed


class Question(NamedTuple):
    """What a conversation asks last, and what it answers."""

    id: str
    text: str
    reference: str
    prompt: Encoded


class Answer(NamedTuple):
    id: str
    question: str
    answer: str
    reference: str

    @property
    def exact(self) -> bool:
        """Whether it is the reference, but for blanks around it."""
        return is_exact(self.answer, self.reference)


class Answers:
    """Asks the first questions of the validation set, always the same. All ranks do so together."""

    def __init__(self, config: Config, held_out: HeldOut | None, device: torch.device, leader: bool):
        self.config, self.held_out, self.device, self.leader = config, held_out, device, leader
        count = max(config.sample.from_validation, min(config.validation.answers, config.validation.max_samples))
        self.questions = read_questions(held_out, count) if held_out and count else []

    def due(self, step: int) -> bool:
        asked = self.config.sample
        return bool(asked.from_validation) and (step % asked.every == 0 or step == self.config.steps)

    def __call__(self, model: nn.Module | Pipeline, average: EMA, step: int) -> str:
        """Write `answers.jsonl`, by the averaged weights where there are some; returns what to tell of it."""
        directory = self.config.run_dir / "samples" / f"step-{step:08d}"
        with average.apply():
            answers = self.ask(model, self.config.sample.from_validation)
        file = directory / "answers.jsonl"
        if self.leader:
            directory.mkdir(parents=True, exist_ok=True)
            rows = (json.dumps(one._asdict() | {"exact": one.exact}, ensure_ascii=False) + "\n" for one in answers)
            replace_file(file, "".join(rows))
        return describe(answers, file)

    def ask(self, model: nn.Module | Pipeline, count: int) -> list[Answer]:
        """The answers to the first `count` questions."""
        processing, most = self.held_out.processing, self.config.sample.max_new_tokens
        asked = self.questions[:count]
        model.eval()
        ids: list[list[int]] = []
        for some in _packed(asked, self.config.data.max_tokens, most):
            prompts = [one.prompt for one in some]
            ids += greedy(model, prompts, most, processing.stop_ids, self.device, processing.banned_ids)
        model.train()
        return [
            Answer(one.id, one.text, processing.read_answer(found), one.reference)
            for one, found in zip(asked, ids, strict=True)
        ]


def read_questions(held_out: HeldOut, count: int) -> list[Question]:
    """The last question of each of the first `count` conversations that can be read."""
    questions: list[Question] = []
    for index in range(len(held_out.data.ids)):
        if len(questions) == count:
            break
        try:
            questions.append(_question(held_out, index))
        except Unusable:  # it is named in the ledger when its loss is asked for
            continue
    return questions


def _question(held_out: HeldOut, index: int) -> Question:
    conversation, processing = held_out.data.conversation(index), held_out.processing
    prompt, reference = processing.prompt(conversation), processing.read_reference(conversation)
    return Question(held_out.data.ids[index], conversation.question, reference, prompt)


def _packed(questions: Sequence[Question], max_tokens: int, most: int) -> Iterator[list[Question]]:
    """As many at a time as have at most `max_tokens` tokens together, with their answers; at least one."""
    some: list[Question] = []
    tokens = 0
    for one in questions:
        size = len(one.prompt.input_ids) + most
        if some and tokens + size > max_tokens:
            yield some
            some, tokens = [], 0
        some.append(one)
        tokens += size
    if some:
        yield some


def share_exact(answers: Sequence[Answer]) -> float:
    """The share of answers that are as expected; NaN of none."""
    return sum(answer.exact for answer in answers) / len(answers) if answers else float("nan")


def describe(answers: Sequence[Answer], file: Path) -> str:
    """How many are right, the first of them, and where all are."""
    right = sum(answer.exact for answer in answers)
    lines = [f"{right} of {len(answers)} answers are as expected, {file}"]
    lines += [
        f"  {shorten(one.question, 80)} -> {shorten(one.answer, 80)}"
        + ("" if one.exact else f" (expected: {shorten(one.reference, 80)})")
        for one in answers[:SHOWN]
    ]
    return "\n".join(lines)
