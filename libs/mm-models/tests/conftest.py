"""Tiny models with nothing at a trivial value: every parameter is drawn, so every one of them matters."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import pytest
import torch
from torch import Tensor, nn

from mm_models import preset
from mm_models.opensoraplan import OpenSoraPlanConfig, OpenSoraPlanModel
from mm_models.qwen2_5_vl import Qwen25VLConfig, Qwen25VLModel, positions
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


@pytest.fixture(scope="session")
def tiny_chat() -> Callable[..., Qwen25VLModel]:
    """tiny_chat(**fields of Qwen25VLConfig) -> a Qwen2.5-VL with random weights and windows of 2 x 2 tokens."""

    def make(**fields) -> Qwen25VLModel:
        sizes = {"dim": 48, "num_heads": 6, "num_kv_heads": 2, "mrope_section": (1, 1, 2), "num_layers": 2}
        sizes |= {"vision_dim": 32, "vision_heads": 2, "vision_layers": 3, "full_attention_layers": (1,)}
        sizes |= {"patch_size": 4, "window_size": 16}
        model = Qwen25VLModel(replace(preset("qwen2.5-vl-tiny"), **sizes | fields))
        randomise(model)
        return model

    return make


@dataclass
class Talk:
    """A conversation as a model is given it; one row."""

    input_ids: Tensor  # 1 L
    position_ids: Tensor  # 3 1 L
    pixel_values: Tensor  # N P
    grid_thw: tuple[tuple[int, int, int], ...]
    labels: Tensor  # 1 L, of the next token
    videos: list[bool]  # of each of grid_thw

    @property
    def inputs(self) -> dict:
        names = ("input_ids", "position_ids", "pixel_values", "grid_thw")
        return {name: getattr(self, name) for name in names}


@pytest.fixture(scope="session")
def talk() -> Callable[..., Talk]:
    """talk(config, 5, (1, 4, 6), 2, (3, 2, 2), seed=0) -> a conversation of 5 tokens of text, an image, 2 of text, and
    a video of three grids. Every third token has no label.
    """

    def make(config: Qwen25VLConfig, *parts: int | tuple[int, int, int], seed: int = 0) -> Talk:
        generator = torch.Generator().manual_seed(seed)
        ids, grids, videos = [], [], []
        for part in parts:
            if isinstance(part, int):
                ids += torch.randint(0, 256, (part,), generator=generator).tolist()
                continue
            grids.append(part)
            videos.append(part[0] > 1)
            token = config.video_token if videos[-1] else config.image_token
            ids += [config.vision_start_token, *[token] * (prod(part) // config.merged), config.vision_end_token]
        input_ids = torch.tensor([ids])
        labels = torch.cat((input_ids[:, 1:], torch.full((1, 1), -100)), 1)
        labels[:, ::3] = -100
        seconds = [1.0 + 0.25 * number for number, video in enumerate(videos) if video]
        places = positions(input_ids, grids, seconds, config=config)
        patches = torch.randn(sum(map(prod, grids)), config.patch_dim, generator=generator)
        return Talk(input_ids, places, patches, tuple(grids), labels, videos)

    return make
