"""What an Open-Sora-Plan model can be asked for, and what its encoders must be; facts, known without torch."""

from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mm_models.family import Published, Task
from mm_models.folder import read_count
from mm_models.opensoraplan.config import OpenSoraPlanConfig
from mm_models.opensoraplan.vae_config import STRIDE, read_config

T2V = Task("t2v")


def tasks(config: OpenSoraPlanConfig) -> tuple[Task, ...]:
    """Video, or with one frame an image, from a prompt alone."""
    return (T2V,)


def tasks_unasked(config: OpenSoraPlanConfig, repository: Path) -> tuple[Task, ...]:
    return tasks(config)


def encoders(config: OpenSoraPlanConfig) -> tuple[str, ...]:
    """Folders of the diffusers directory."""
    return ("vae", "text_encoder", "tokenizer")


def multiples(config: OpenSoraPlanConfig, repository: Path) -> tuple[int, int, int]:
    """Frames per latent frame, and rows and columns of pixels per token: what the sizes of a video must divide by."""
    frames, rows, columns = (stride * patch for stride, patch in zip(STRIDE, config.patch_size, strict=True))
    return frames, rows, columns


def fit(config: OpenSoraPlanConfig, repository: Path) -> OpenSoraPlanConfig:
    """The configuration as it is. ValueError for encoders of another width than the model takes."""
    width = read_count(repository / "text_encoder" / "config.json", "d_model", config.text_dim)
    found = [("video channels", read_config(repository / "vae").embed_dim, config.out_channels)]
    found += [("text width", width, config.text_dim)]
    wrong = [f"{what} {said} instead of {size}" for what, said, size in found if said != size]
    if wrong:
        raise ValueError(
            f"{repository} holds the encoders of another model ({', '.join(wrong)}): give a directory with the VAE "
            "and the mT5 that this model was published with"
        )
    return config


def sized(published: Published, config: OpenSoraPlanConfig) -> Published:
    """With the size and the length that weights were trained on, where they say so; they make no other length."""
    if config.sample_size is None:
        return published
    frames, *size = _pixels(config.sample_size)
    return replace(published, size=tuple(size), frames=frames, trained_frames=frames)


def note_shapes(config: OpenSoraPlanConfig, shapes: Collection[tuple[int, int, int]]) -> str | None:
    """What to tell where no sample has the length and size of config.json, by which mm_infer goes; else None."""
    if config.sample_size is None or config.sample_size in shapes:
        return None
    usual, *others = Counter(shapes).most_common()
    found, more = usual[0], f", and {len(others)} other shapes" * bool(others)
    return (
        f"no sample has {_words(config.sample_size)}, which config.json will say and mm_infer will make. Samples have "
        f"{_words(found)}{more}: choose another --model, or --architecture '{{\"sample_size\": {list(found)}}}'"
    )


def _pixels(latents: tuple[int, int, int]) -> tuple[int, int, int]:
    """Frames, rows and columns of the video that becomes such latents."""
    frames, rows, columns = latents
    return (frames - 1) * STRIDE[0] + 1, rows * STRIDE[1], columns * STRIDE[2]


def _words(latents: tuple[int, int, int]) -> str:
    frames, rows, columns = _pixels(latents)
    return f"{frames} frame{'s' * (frames > 1)} of {rows}x{columns}"


def describe(config: OpenSoraPlanConfig) -> dict[str, Any]:
    """The fields that are written into config.json: all, so that a size that there is not is said, too."""
    return asdict(config)
