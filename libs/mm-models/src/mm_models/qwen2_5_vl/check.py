"""Shapes that a Qwen2.5-VL model takes."""

import torch
from torch import Tensor

from mm_models.layers import Sequence
from mm_models.qwen2_5_vl.config import Qwen25VLConfig
from mm_models.qwen2_5_vl.grids import Grid, count_patches


def check(
    config: Qwen25VLConfig,
    input_ids: Tensor,
    position_ids: Tensor,
    pixel_values: Tensor,
    grids: tuple[Grid, ...],
    sequence: Sequence,
    labels: Tensor | None = None,
) -> None:
    """Raises ValueError for a batch that does not fit the model, with the numbers and what would fit."""
    if input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ValueError(f"input_ids has shape {_words(input_ids)}, but must be B L, whole numbers")
    shape = tuple(input_ids.shape)
    if tuple(position_ids.shape) != (3, *shape) or position_ids.is_floating_point():
        raise ValueError(
            f"position_ids has shape {_words(position_ids)}, but must be {(3, *shape)}, whole numbers: time, row and "
            "column of each of input_ids, see mm_models.qwen2_5_vl.positions"
        )
    if labels is not None and (tuple(labels.shape) != shape or labels.is_floating_point()):
        raise ValueError(
            f"labels has shape {_words(labels)}, but must be {shape}, whole numbers: for each of input_ids the token "
            "that follows, or -100"
        )
    segments = sequence.segments or (0, sequence.tokens)
    if (sequence.tokens, segments[0], segments[-1]) != (shape[1], 0, shape[1]):
        raise ValueError(
            f"sequence has {sequence.tokens} tokens in segments that go from {segments[0]} to {segments[-1]}, but "
            f"input_ids has {shape[1]} tokens in a row"
        )
    if pixel_values.ndim != 2 or pixel_values.shape[1] != config.patch_dim or not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values has shape {_words(pixel_values)}, but must be N {config.patch_dim}, patches of "
            f"{config.channels} channels, {config.temporal_patch_size} frames and {config.patch_size} x "
            f"{config.patch_size} pixels"
        )
    patches = count_patches(grids)
    if pixel_values.shape[0] != patches:
        raise ValueError(
            f"pixel_values has {pixel_values.shape[0]} patches, but the {len(grids)} rows of grid_thw make {patches}"
        )


def check_tokens(config: Qwen25VLConfig, seen: Tensor, patches: int) -> None:
    """Raises ValueError unless there is a token of an image or video (seen: B L, bool) for every feature.

    On CUDA the device checks it, as the host would have to wait: the program ends with torch's error of an assertion.
    """
    if seen.is_meta:  # a pipeline asks for shapes
        return
    features, count = patches // config.merged, seen.sum()
    if seen.is_cuda:
        torch._assert_async(
            count == features, f"input_ids must have {features} tokens of images and videos, as grid_thw makes"
        )
    elif count != features:
        raise ValueError(
            f"input_ids has {int(count)} tokens of images and videos ({config.image_token} and {config.video_token}), "
            f"but grid_thw makes {features} features: was an image cut, or left out?"
        )


def _words(x: Tensor) -> str:
    return f"{tuple(x.shape)} of {x.dtype}"
