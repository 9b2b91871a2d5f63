"""Where the parts of a pipeline lie, and what their files say before a tensor is read."""

import json
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mm_models.wan import WanConfig

ENCODERS = ("vae", "text_encoder", "tokenizer")


def find_encoders(weights: Path, encoders: Path | None, image: bool) -> Path:
    """The diffusers directory with the folders of `ENCODERS`, and with that of CLIP if `image`.

    ValueError that says what is missing where.
    """
    place = weights if encoders is None else encoders
    wanted = (*ENCODERS, "image_encoder") if image else ENCODERS
    missing = [f"{name}/" for name in wanted if not (place / name).is_dir()]
    if not missing:
        return place
    if encoders is None and len(missing) == len(wanted):
        raise ValueError(f"{weights} is a transformer alone: name the diffusers directory of the encoders as well")
    raise ValueError(f"{place} has no {', '.join(missing)}: the encoders are folders of a diffusers directory")


def must_exist(path: Path, what: str) -> Path:
    """The path itself, or a ValueError with its nearest neighbour."""
    if path.exists():
        return path
    neighbours = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, neighbours, n=1)
    raise ValueError(f"{what}: {path} does not exist" + (f", did you mean {path.parent / near[0]}?" if near else ""))


def fitted(config: WanConfig, encoders: Path) -> WanConfig:
    """The model's configuration, with the number of tokens that this CLIP makes of an image.

    Raises ValueError unless the encoders are as wide as the model takes them.
    """
    wanted = [("vae", "z_dim", config.out_channels), ("text_encoder", "d_model", config.text_dim)]
    wanted += [("image_encoder", "hidden_size", config.image_dim)] if config.image_dim else []
    for part, field, size in wanted:
        said = _config(encoders / part).get(field, size)
        if said != size:
            raise ValueError(
                f"{encoders / part} has {field} {said}, but the model takes {size}: name the diffusers directory that "
                "this model was published with (encoders)"
            )
    if config.image_dim is None or config.image_tokens > 257:
        return config
    clip = _config(encoders / "image_encoder")
    patches = clip.get("image_size", 224) // clip.get("patch_size", 14)
    return replace(config, image_tokens=patches**2 + 1)


def pixels_per_latent(encoders: Path) -> int:
    """Along a side, of the VAE: 8 of Wan2.1, 16 of Wan2.2."""
    said = _config(encoders / "vae")
    return 2 ** (len(said.get("dim_mult", (1, 2, 4, 4))) - 1) * (said.get("patch_size") or 1)


def keeps_first_frame(encoders: Path, config: WanConfig) -> bool:
    """Whether the model was published for videos whose first frame is given clean, at timestep 0: Wan2.2 5B."""
    index = encoders / "model_index.json"
    return config.out_channels == 48 or bool(index.is_file() and _json(index).get("expand_timesteps"))


def _config(folder: Path) -> dict[str, Any]:
    return _json(folder / "config.json")


def _json(file: Path) -> dict[str, Any]:
    try:
        return {**json.loads(file.read_text(encoding="utf-8"))}
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise ValueError(f"{file} is not a JSON object: {error}") from error
