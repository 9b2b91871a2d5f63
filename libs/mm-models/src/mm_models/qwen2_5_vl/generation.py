"""Answers by transformers' generation, token by token with a cache: our weights, our pixels, our positions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from mm_models.encoders.loading import check_finite, quiet
from mm_models.processors import Encoded
from mm_models.qwen2_5_vl.config import Qwen25VLConfig
from mm_models.qwen2_5_vl.hub import write_config


class Qwen25VLGenerator:
    """`generator(prompt, …) -> ids` of an answer.

    Args:
        config: of the weights.
        tensors: by our names; of a checkpoint they are read one by one.
        device, dtype: where and in what all is computed.

    ValueError for a transformers before 5, which makes positions of its own while it generates; and for tensors that
    are not those of the model.
    """

    def __init__(
        self, config: Qwen25VLConfig, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
    ) -> None:
        if int(version("transformers").split(".")[0]) < 5:
            raise ValueError(
                f"transformers {version('transformers')} is too old to answer with: it makes positions of its own; "
                "install transformers>=5"
            )
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        self.config, self.device = config, device
        with quiet():
            self.model, found = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                None,
                config=Qwen2_5_VLConfig(**write_config(config)),
                state_dict=dict(tensors),
                dtype=dtype,
                output_loading_info=True,
            )
        wrong = {kind: sorted(names) for kind, names in found.items() if names}
        if wrong:
            raise ValueError(f"the weights are not those of this model: {wrong}")
        check_finite(self.model, Path("the weights"))
        self.model.to(device).eval()

    @torch.inference_mode()
    def __call__(
        self,
        prompt: Encoded,
        *,
        max_new_tokens: int,
        stop_ids: Collection[int],
        banned_ids: Collection[int] = (),
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[int]:
        """The tokens of an answer, without the one that ends it.

        banned_ids: tokens that no answer has.
        temperature: 0 takes the likeliest token; above, tokens are drawn, from all, with `seed`.

        Nothing of generation_config.json counts, such as the makers' repetition_penalty.
        """
        from transformers import GenerationConfig

        drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        stops = sorted(stop_ids)
        how = GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=stops,
            pad_token_id=stops[0],
            suppress_tokens=sorted(banned_ids) or None,
            **{"do_sample": False} | drawn,
        )
        with torch.random.fork_rng(devices=[] if self.device.type == "cpu" else [self.device]):
            torch.manual_seed(seed)
            ids = self.model.generate(**self._inputs(prompt), generation_config=how)
        answer = ids[0, len(prompt.input_ids) :].tolist()
        return answer[:-1] if answer and answer[-1] in stop_ids else answer

    def _inputs(self, prompt: Encoded) -> dict[str, Tensor]:
        """As the class takes them: images and videos apart, and positions, which it would make otherwise.

        While it generates, it counts on from the last position, which is the largest, for a prompt ends with text.
        """
        inputs = {
            "input_ids": prompt.input_ids[None],
            "attention_mask": torch.ones_like(prompt.input_ids)[None],
            "position_ids": prompt.position_ids[:, None],
        }
        tokens = self.config.image_token, self.config.video_token
        pads = prompt.input_ids[torch.isin(prompt.input_ids, torch.tensor(tokens))]
        patches = prompt.grid_thw.prod(1)
        kinds = pads[(patches.cumsum(0) - patches) // self.config.merged]  # of the first token of each
        for token, pixels, grid in (
            (tokens[0], "pixel_values", "image_grid_thw"),
            (tokens[1], "pixel_values_videos", "video_grid_thw"),
        ):
            mine = kinds == token
            if mine.any():
                inputs[pixels] = prompt.pixel_values[mine.repeat_interleave(patches)]
                inputs[grid] = prompt.grid_thw[mine]
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}
