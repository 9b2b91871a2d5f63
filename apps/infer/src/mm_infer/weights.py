"""Which model lies at a path, one or two experts, with or without LoRA, and how it is filled."""

import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import torch

import mm_models
from mm_convert import open_checkpoint, open_experts, open_lora
from mm_models import preset
from mm_models.diffusion.sampling import Experts
from mm_models.layers import cast_weights
from mm_models.lora import load_lora
from mm_models.wan import WanConfig, WanModel
from mm_parallel import load_parameters


class Weights:
    """A model, or two experts of one architecture. Names and shapes are compared; no tensor is read yet."""

    def __init__(
        self,
        path: Path,
        model: str | None = None,
        lora: Path | None = None,
        text_tokens: int | None = None,
        boundary: float | None = None,
    ) -> None:
        """ValueError unless the files hold exactly the tensors of a model, or of two that are alike."""
        pair = open_experts(path)
        loras = None if lora is None else open_experts(lora)
        if loras is not None and pair is None:
            raise ValueError(f"lora {lora} is for two experts, but {path} holds one model: name one of its folders")
        if boundary is not None and pair is None:
            raise ValueError(f"boundary {boundary} is for two experts, but {path} holds one model: leave it out")
        if boundary is not None and not 0 < boundary < 1:
            raise ValueError(f"boundary {boundary}: must be a noise level between 0 and 1, as 0.875")
        if pair is None:
            self.experts = (Transformer(path, model, lora, text_tokens),)
        else:
            adapters = (loras.high, loras.low) if loras else (lora, lora)
            self.experts = tuple(
                Transformer(folder, model, adapter, text_tokens)
                for folder, adapter in zip((pair.high, pair.low), adapters, strict=True)
            )
            if self.experts[0].config != self.experts[1].config:
                raise ValueError(f"{path}: the two experts differ: {self.experts[0].config}, {self.experts[1].config}")
        self.config = self.experts[0].config
        self.boundary = None if pair is None else boundary or pair.boundary or self._usual_boundary(model)

    def _usual_boundary(self, model: str | None) -> float:
        """Of the preset, or where nobody says it, of the published models."""
        named = None if model is None else mm_models.boundary(model)
        return named or (0.875 if self.config.in_channels == self.config.out_channels else 0.9)

    def load(
        self,
        config: WanConfig,
        device: torch.device,
        dtype: torch.dtype,
        offload: bool = False,
        each: Callable[[WanModel], None] = lambda model: None,
    ) -> WanModel | Experts:
        """On the device (of two experts with `offload`, the second on the host); `each` is called for every one.

        config: that of the weights, or with another number of tokens for text or image.
        """
        models: list[WanModel] = []
        for number, expert in enumerate(self.experts):
            host = torch.device("cpu") if number and offload else device
            models.append(expert.load(config, host, dtype))
            each(models[-1])
        return models[0] if len(models) == 1 else Experts(*models, self.boundary, offload)


class Transformer:
    """A checkpoint whose names and shapes are known to be those of a model, and whose tensors are not read yet."""

    def __init__(self, path: Path, model: str | None, lora: Path | None, text_tokens: int | None = None) -> None:
        """ValueError unless the files hold exactly the tensors of a model."""
        self.checkpoint, self.lora = open_checkpoint(path), None if lora is None else open_lora(lora)
        self.config = _config(path, self.checkpoint.config, model)
        if text_tokens is not None:
            self.config = replace(self.config, text_tokens=text_tokens)
        for note in self.lora.notes if self.lora else ():
            print(f"{lora}: {note}", file=sys.stderr)
        try:
            self._adapt(self._empty(torch.float32, self.config))  # on the meta device: only a comparison
        except ValueError as error:
            raise ValueError(f"lora {lora}: {error}") from error

    def load(self, config: WanConfig, device: torch.device, dtype: torch.dtype) -> WanModel:
        """The model on the device, in `dtype` except its islands, read tensor by tensor."""
        model = self._empty(dtype, config)
        load_parameters(model, self.checkpoint, device)
        self._adapt(model)
        return model.eval().requires_grad_(False)

    def _adapt(self, model: WanModel) -> None:
        if self.lora is not None:
            load_lora(model, self.lora, self.lora.alphas)

    def _empty(self, dtype: torch.dtype, config: WanConfig) -> WanModel:
        with torch.device("meta"):
            return cast_weights(WanModel(config), dtype)


def _config(path: Path, read: dict, model: str | None) -> WanConfig:
    """What the files say, or the preset if they do not contradict it."""
    read = {
        k: tuple(v) if isinstance(v, list) else v for k, v in read.items() if k in {f.name for f in fields(WanConfig)}
    }
    if model is None:
        if "num_heads" not in read:
            raise ValueError(f"{path}: the tensors do not say the number of heads: name the preset (model)")
        return WanConfig(**read)
    config = preset(model)
    other = [f"{k} {v} instead of {getattr(config, k)}" for k, v in read.items() if v != getattr(config, k)]
    if other:
        raise ValueError(f"{path} is no {model}: it has {', '.join(other)}; without model, it is taken as it is")
    return config
