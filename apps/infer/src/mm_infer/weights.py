"""Where the parts of a pipeline lie, which model they are, and how the transformer is filled."""

from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path

import torch

from mm_convert import open_checkpoint
from mm_models import preset
from mm_models.layers import cast_weights
from mm_models.lora import load_lora
from mm_models.wan import WanConfig, WanModel
from mm_parallel import load_parameters

ENCODERS = ("vae", "text_encoder", "tokenizer")


def find_encoders(weights: Path, encoders: Path | None) -> Path:
    """The diffusers directory with the folders of `ENCODERS`. ValueError that says what is missing where."""
    place = weights if encoders is None else encoders
    missing = [f"{name}/" for name in ENCODERS if not (place / name).is_dir()]
    if not missing:
        return place
    if encoders is None and len(missing) == len(ENCODERS):
        raise ValueError(f"{weights} is a transformer alone: name the diffusers directory of the encoders as well")
    raise ValueError(f"{place} has no {', '.join(missing)}: the encoders are folders of a diffusers directory")


def must_exist(path: Path, what: str) -> Path:
    """The path itself, or a ValueError with its nearest neighbour."""
    if path.exists():
        return path
    neighbours = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, neighbours, n=1)
    raise ValueError(f"{what}: {path} does not exist" + (f", did you mean {path.parent / near[0]}?" if near else ""))


class Transformer:
    """A checkpoint whose names and shapes are known to be those of a model, and whose tensors are not read yet."""

    def __init__(self, path: Path, model: str | None, lora: Path | None, text_tokens: int | None = None) -> None:
        """ValueError unless the files hold exactly the tensors of a model that makes videos from text alone."""
        self.checkpoint, self.lora = open_checkpoint(path), lora
        self.config = _config(path, self.checkpoint.config, model)
        if text_tokens is not None:
            self.config = replace(self.config, text_tokens=text_tokens)
        if self.config.in_channels != self.config.out_channels or self.config.image_dim is not None:
            raise ValueError(
                f"{path} makes videos from images ({self.config.in_channels} input channels), "
                "but mm_infer makes them from text only so far: take text-to-video weights"
            )
        if lora is not None:
            load_lora(self._empty(torch.float32), lora)  # on the meta device: only a comparison

    def load(self, device: torch.device, dtype: torch.dtype) -> WanModel:
        """The model on the device, in `dtype` except its islands, read tensor by tensor."""
        model = self._empty(dtype)
        load_parameters(model, self.checkpoint, device)
        if self.lora is not None:
            load_lora(model, self.lora)
        return model.eval().requires_grad_(False)

    def _empty(self, dtype: torch.dtype) -> WanModel:
        with torch.device("meta"):
            return cast_weights(WanModel(self.config), dtype)


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
