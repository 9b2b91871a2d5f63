"""A pack of conversations that nobody has written: shapes of what a Qwen2.5-VL is trained on."""

from math import isqrt

import torch
from torch import Tensor

from mm_models.family import PackSize
from mm_models.qwen2_5_vl.config import Qwen25VLConfig
from mm_models.qwen2_5_vl.grids import Grid
from mm_models.tokens.head import IGNORED


def example(config: Qwen25VLConfig, task: str, size: PackSize) -> dict[str, Tensor]:
    """The tensors of one pack, see `mm_models.tokens.NextToken`. Each conversation has one image, nearly square.

    On the meta device but for segments, grids and labels: of these the values are asked for. Trained are the last
    tokens of the pack: how many there are decides what the head costs, not where they stand.
    Raises ValueError for images with more tokens than the pack has.
    """
    each = size.tokens // size.conversations
    grid = find_grid(config, size.patches // size.conversations)
    grids = [grid] * size.conversations if grid else []
    patches = sum(rows * columns for _, rows, columns in grids)
    if patches // config.merged > size.tokens:
        raise ValueError(
            f"{patches} patches of images become {patches // config.merged} tokens, but the pack has {size.tokens}"
        )
    ends = [*(each * number for number in range(size.conversations)), size.tokens]
    trained = size.tokens if size.labels is None else min(size.labels, size.tokens)
    labels = torch.full((1, size.tokens), IGNORED)
    labels[:, size.tokens - trained :] = config.eos_token
    return {
        "input_ids": torch.empty((1, size.tokens), dtype=torch.long, device="meta"),
        "labels": labels,
        "position_ids": torch.empty((1, 3, size.tokens), dtype=torch.long, device="meta"),
        "segments": torch.tensor([ends]),
        "pixel_values": torch.empty((1, patches, config.patch_dim), device="meta"),
        "grid_thw": torch.tensor(grids, dtype=torch.long).reshape(1, -1, 3),
    }


def find_grid(config: Qwen25VLConfig, patches: int) -> Grid | None:
    """The largest grid of an image of at most so many patches that is nearly square; None where there is none."""
    tokens, merge = patches // config.merged, config.spatial_merge_size
    if tokens < 1:
        return None
    rows = isqrt(tokens)
    return 1, rows * merge, tokens // rows * merge
