"""A model that answers conversations: its weights, its processing, and transformers' generation.

This file imports no torch before a model is made: wrong weights are refused at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mm_convert import open_checkpoint, open_lora
from mm_convert.cli.terminal import one_line
from mm_convert.lora.base import check_base, describe_content
from mm_convert.lora.merging import merge
from mm_convert.tensors.mapping import Tensors
from mm_data.chat_options import ChatOptions
from mm_data.conversations import Conversation
from mm_infer.weights import check_family, must_exist, read_architecture
from mm_models.families import family_of_weights
from mm_models.family import Family
from mm_models.processors import is_exact

if TYPE_CHECKING:
    import torch

    from mm_parallel.config import AttentionName


class Answer(NamedTuple):
    text: str
    reference: str | None
    """What the conversation itself answers, as the model would say it; None where it ends with a question."""
    exact: bool
    """Whether they are the same, but for blanks around them."""


class Model:
    """Weights that are known to be whole, and the folder of their processor; no tensor is read yet."""

    def __init__(
        self,
        weights: Path | str,
        processor: Path | str | None = None,
        *,
        model: str | None = None,
        lora: Path | str | None = None,
        lora_alpha: float | None = None,
    ) -> None:
        """The arguments are the flags of the same names (see `mm_infer.chat.Config`).

        ValueError for a path that is not there, for weights that are not whole or make videos, for an adapter that
        does not fit, and for a folder without a processor.
        """
        path = must_exist(Path(weights), "weights")
        if processor is None and (path / "checkpoints").is_dir():
            raise ValueError(
                f"weights {path} is a run: give {path / 'weights'}, which has its tokenizer, too, when it has ended; "
                "before that, name the folder of the hub as well (processor)"
            )
        self.checkpoint = checkpoint = open_checkpoint(path)
        self.family: Family = family_of_weights(checkpoint.family)
        chat = self.family.need_chat(f"give `python -m mm_infer --weights {path} --prompt … --output …`")
        self.config = read_architecture(path, self.family, checkpoint, model)
        self.tensors: Tensors = checkpoint
        notes = [f"{path}: {note}" for note in checkpoint.notes]
        if lora is not None:
            lora = must_exist(Path(lora), "lora")
            adapter = open_lora(lora, alpha=lora_alpha)
            notes += [f"{lora}: {note}" for note in adapter.notes]
            check_family(lora, adapter, self.family)
            facts = {"family": self.family.name}
            if adapter.trained_on:
                facts |= describe_content(checkpoint.tensors, adapter.modules)
            notes += [f"{lora}: {note}" for note in check_base(adapter.trained_on, facts, f"lora {lora}")]
            try:
                self.tensors = Tensors(merge(checkpoint.tensors, adapter))
            except ValueError as error:
                raise ValueError(f"lora {lora}: {error}") from error
        elif lora_alpha is not None:
            raise ValueError(f"lora_alpha {lora_alpha} is that of an adapter: name it (lora), or leave it out")
        for note in notes:
            print(one_line(note), file=sys.stderr)
        self.processor = path if processor is None else must_exist(Path(processor), "processor")
        if not any((self.processor / name).is_file() for name in chat.files):
            way = "name the folder of the hub (processor)" if processor is None else "name the folder of the hub"
            raise ValueError(f"{self.processor} holds no tokenizer and no image processor: {way}")


class Answerer:
    """`answerer(conversation) -> Answer`.

    device: by default the accelerator of this machine. dtype: by default bfloat16 there, float32 on a CPU. attention:
    the kernel that a program has made torch ready for, see `mm_parallel.attention.activate`.
    Raises ValueError for a kernel that cannot run here.
    """

    def __init__(
        self,
        model: Model,
        options: ChatOptions | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        attention: AttentionName = "auto",
    ) -> None:
        import torch

        from mm_parallel.attention import describe_choice
        from mm_parallel.device import bf16_ok
        from mm_parallel.device import device as accelerator

        self.device = accelerator() if device is None else torch.device(device)
        if dtype is None:
            fast = self.device.type != "cpu" and bf16_ok(self.device)
            dtype = torch.bfloat16 if fast else torch.float32
        with torch.device("meta"):
            plan = model.family.plan(model.family.build(model.config))
        describe_choice(attention, plan, self.device, dtype)  # or refuses it
        chat = model.family.chat
        self.processing = chat.processing(model.processor, options or ChatOptions(), model.config)
        self.generator = chat.generator(model.config, model.tensors, self.device, dtype)

    def __call__(
        self,
        conversation: Conversation,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Answer:
        """The answer to its last question. Boxes are in pixels of the picture as the model sees it: see
        `processing.scale_back`.

        Raises `mm_data.conversations.Unusable` for pictures and videos that cannot be read.
        """
        processing = self.processing
        ids = self.generator(
            processing.prompt(conversation),
            max_new_tokens=max_new_tokens,
            stop_ids=processing.stop_ids,
            banned_ids=processing.banned_ids,
            temperature=temperature,
            seed=seed,
        )
        text, reference = processing.read_answer(ids), processing.read_reference(conversation)
        return Answer(text, reference, reference is not None and is_exact(text, reference))
