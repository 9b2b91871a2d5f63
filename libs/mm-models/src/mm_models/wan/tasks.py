"""What a Wan model can be asked for, and what its encoders must be; facts, known without torch.

t2v     a prompt alone
i2v     an image, the first frame
flf2v   the first and the last frame
ti2v    a first frame that is kept clean, at timestep 0
v2v     a video, from which sampling begins; trained as t2v
vace    any of a source video, a mask of what changes in it, and reference images
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mm_models.family import Task
from mm_models.folder import read_count, read_json
from mm_models.wan.config import WanConfig

T2V = Task("t2v")
I2V = Task("i2v", needs=("image",))
FLF2V = Task("flf2v", needs=("image", "last_image"), least_frames=5)
TI2V = Task("ti2v", needs=("image",), least_frames=5)  # the first latent frame is given: one more is to be made
V2V = Task("v2v", needs=("video",), options={"strength": 0.7}, trained=False)
VACE = Task("vace", takes=("video", "mask", "references"), options={"control_scale": 1.0})

CONDITION = {"i2v": "condition", "flf2v": "condition_both"}  # two names: features of one are none of the other
MASK_SIDE = 8  # pixels per latent, along which VACE's mask is folded into channels
HIGH_VAE_CHANNELS = 48  # of the VAE of Wan2.2 5B, which was published for clean first frames


def tasks(config: WanConfig) -> tuple[Task, ...]:
    """What a model can be asked for, the usual first."""
    if config.vace_layers:
        return (VACE,)
    if config.in_channels == config.out_channels:
        return (T2V, TI2V, V2V)
    if config.image_dim is None:
        return (I2V, FLF2V)
    return (FLF2V,) if config.two_images else (I2V,)


def tasks_unasked(config: WanConfig, repository: Path) -> tuple[Task, ...]:
    """Those that may be meant when none is named: an image means ti2v only where the weights were published for it."""
    index = repository / "model_index.json"
    keeps_first = config.out_channels == HIGH_VAE_CHANNELS or (
        index.exists() and bool(read_json(index).get("expand_timesteps"))
    )
    return tuple(task for task in tasks(config) if task is not TI2V or keeps_first)


def stored(config: WanConfig, task: str) -> dict[str, int]:
    """The conditions of a sample that a feature cache has to hold for training, with their channels (or rows).

    Nothing for ti2v: its condition is the first latent frame of the sample itself, as the VAE is causal.
    """
    if task == "vace":
        return {"control": 2 * config.out_channels, "control_mask": MASK_SIDE**2}
    if task in CONDITION:
        image = {"image": config.image_tokens} if config.image_dim else {}
        return {CONDITION[task]: config.out_channels} | image
    return {}


def encoders(config: WanConfig) -> tuple[str, ...]:
    """Folders of the diffusers directory."""
    return ("vae", "text_encoder", "tokenizer", *(("image_encoder",) if config.image_dim is not None else ()))


def multiples(config: WanConfig, repository: Path) -> tuple[int, int, int]:
    """Frames per latent frame, and rows and columns of pixels per token: what the sizes of a video must divide by."""
    file = repository / "vae" / "config.json"
    said = {"dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True]} | read_json(file)
    if not all(isinstance(said[key], list) and 1 <= len(said[key]) < 10 for key in ("dim_mult", "temperal_downsample")):
        raise ValueError(f"{file}: dim_mult and temperal_downsample must be short lists, as the model's makers publish")
    side = 2 ** (len(said["dim_mult"]) - 1) * (read_count(file, "patch_size", 1) if said.get("patch_size") else 1)
    time = 2 ** sum(map(bool, said["temperal_downsample"]))
    return time * config.patch_size[0], side * config.patch_size[1], side * config.patch_size[2]


def fit(config: WanConfig, repository: Path) -> WanConfig:
    """The configuration, with the number of tokens that this CLIP makes of an image.

    A model with a position for each image token cannot change their number, and keeps it.

    Raises:
        ValueError: encoders of another width than the model takes.
    """
    wanted = [("video channels", "vae", "z_dim", config.out_channels)]
    wanted += [("text width", "text_encoder", "d_model", config.text_dim)]
    wanted += [("CLIP width", "image_encoder", "hidden_size", config.image_dim)] if config.image_dim else []
    found = [(what, read_count(repository / part / "config.json", key, size), size) for what, part, key, size in wanted]
    wrong = [f"{what} {said} instead of {size}" for what, said, size in found if said != size]
    if wrong:
        raise ValueError(
            f"{repository} holds the encoders of another model ({', '.join(wrong)}): give the directory that this "
            "model was published with"
        )
    if config.image_dim is None or config.two_images:
        return config
    clip = repository / "image_encoder" / "config.json"
    patches = read_count(clip, "image_size", 224) // read_count(clip, "patch_size", 14)
    return replace(config, image_tokens=patches**2 + 1)


def describe(config: WanConfig) -> dict[str, Any]:
    """The fields that are written into config.json, without what the model does not have or leaves to the default."""
    without = set() if config.vace_layers else {"vace_layers", "control_channels"}
    without |= {"image_positions"} if config.image_positions is None else set()
    return {name: value for name, value in asdict(config).items() if name not in without}
