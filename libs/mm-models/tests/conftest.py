"""Tiny models with nothing at a trivial value: every parameter is drawn, so every one of them matters."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mm_models.opensoraplan import OpenSoraPlanConfig, OpenSoraPlanModel
from mm_models.wan import WanConfig, WanModel


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Matrices keep the size of a signal, norms vary around one, tables and biases are far from zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(generator=generator)
            if parameter.ndim > 1 and "table" not in name and "modulation" not in name and "emb" not in name[-9:]:
                parameter.div_(parameter[0].numel() ** 0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.mul_(0.3).add_(1)
            else:
                parameter.mul_(0.4)


def _config(head_dim: int = 12, **fields) -> WanConfig:
    return WanConfig(
        **{"dim": 2 * head_dim, "num_heads": 2, "ffn_dim": 32, "num_layers": 3, "text_dim": 16, "text_tokens": 512}
        | fields
    )


@pytest.fixture
def tiny() -> Callable[..., WanModel]:
    """tiny(head_dim=12, **fields of WanConfig) -> model with random weights."""

    def make(**fields) -> WanModel:
        model = WanModel(_config(**fields))
        randomise(model)
        return model

    return make


@pytest.fixture
def batch() -> Callable[[WanModel], dict[str, Tensor]]:
    """batch(model) -> two samples of different timesteps and prompt lengths, on a grid of three different sizes."""

    def make(model: WanModel) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        config = model.config
        text = torch.randn(2, config.text_tokens, config.text_dim, generator=generator)
        text[0, config.text_tokens * 3 // 4 :] = 0  # rows beyond the true length
        inputs = {
            "video": torch.randn(2, config.in_channels, 5, 8, 6, generator=generator),
            "t": torch.tensor([999.0, 250.0]),
            "text": text,
        }
        if config.image_dim is not None:
            inputs["image"] = torch.randn(2, config.image_tokens, config.image_dim, generator=generator)
        if config.vace_layers:
            inputs["control"] = torch.randn(2, config.control_channels, 5, 8, 6, generator=generator)
        return inputs

    return make


@pytest.fixture
def tiny_plan() -> Callable[..., OpenSoraPlanModel]:
    """tiny_plan(**fields of OpenSoraPlanConfig) -> an Open-Sora-Plan model with random weights."""

    def make(**fields) -> OpenSoraPlanModel:
        dim = fields.get("dim", 48)
        sizes = {"dim": dim, "num_heads": 2, "ffn_dim": 4 * dim, "num_layers": 3, "text_dim": 32}
        model = OpenSoraPlanModel(OpenSoraPlanConfig(**sizes | fields))
        randomise(model)
        return model

    return make


@pytest.fixture
def plan_batch() -> Callable[..., dict[str, Tensor]]:
    """plan_batch(frames, masks) -> two samples on a grid of three different sizes, the second one partly padding."""

    def make(frames: int = 3, masks: tuple[str, ...] = ()) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        inputs = {
            "video": torch.randn(2, 4, frames, 8, 12, generator=generator),
            "t": torch.tensor([911, 37]),
            "text": torch.randn(2, 9, 32, generator=generator),
        }
        text_mask, video_mask = torch.ones(2, 9, dtype=torch.bool), torch.ones(2, frames, 8, 12, dtype=torch.bool)
        text_mask[0, 7:] = text_mask[1, 4:] = False
        video_mask[1, 2:] = False  # the last frame
        video_mask[1, :, :, 9:] = False  # and three columns: a token of columns 8 and 9 is seen
        return inputs | {
            name: mask for name, mask in (("text_mask", text_mask), ("video_mask", video_mask)) if name in masks
        }

    return make
