"""Open-Sora-Plan's codec: the causal VAE of its makers, from the files that they publish or what is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self

import torch
from torch import Tensor

from mm_models.encoders.codec import check_video
from mm_models.encoders.loading import check_finite, identity
from mm_models.family import Tiling
from mm_models.folder import part_of, read_json
from mm_models.opensoraplan import tiles
from mm_models.opensoraplan.vae_config import STRIDE, check_folder, read_config
from mm_models.opensoraplan.vae_model import LOGVAR, CausalVAE

SCALE = 0.18215
"""What latents are multiplied by, so that their deviation is near 1."""
TRAINING_ONLY = "loss."
"""Beside a VAE's weights in its makers' checkpoints: the discriminator, the perceptual network and the weight of the
variance, which trained it. They are left out.
"""
WRITERS = ("argparse", "collections", "lightning", "numpy", "omegaconf", "opensora", "pytorch_lightning", "torch")
"""Packages whose objects lie beside the weights in checkpoints."""


class OpenSoraPlanVAE:
    """An `mm_models.encoders.Codec`, from vae/ of a repository; `vae_config` says what may lie in it."""

    def __init__(
        self,
        path: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        tiling: Tiling = "none",
    ) -> None:
        """tiling: as the makers tile when they train (tiles of 33 frames of 256x256 pixels; of latents 16 of 32x32),
        or when they sample (29 of 512x512; 8 of 64x64). What is no larger than one tile is the same with and without.
        """
        folder = part_of(path, "vae")
        self.device, self.dtype = torch.device(device), dtype
        self.vae = load(folder, self.device, dtype)
        self.tiles = None if tiling == "none" else tiles.TILES[tiling]
        self.identity = identity([folder], {"dtype": str(dtype), "tiling": tiling})
        self.stride = STRIDE
        """Frames, rows and columns of pixels per latent."""
        self.channels: int = self.vae.config.embed_dim

    def to(self, device: torch.device | str) -> Self:
        """Moves the weights to a device, and what is encoded from then on is made there. Returns itself."""
        self.device = torch.device(device)
        self.vae.to(self.device)
        return self

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """C F' h w of a video of this many frames and pixels."""
        time, rows, columns = self.stride
        return self.channels, (frames - 1) // time + 1, height // rows, width // columns

    def encode(self, video: Tensor) -> Tensor:
        """Video B 3 F H W in [-1, 1] to latents B 4 F' h w in float32, F' = (F - 1) / 4 + 1: the mean of the posterior
        times 0.18215, so no chance is involved. Raises ValueError for a size that does not fit.
        """
        return self.posterior(video)[0] * SCALE

    @torch.no_grad()
    def posterior(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log of the variance of the latents of a video, both B 4 F' h w in float32, not scaled."""
        check_video(video, self.stride)
        moments = self._moments(video) if self.tiles is None else tiles.encode(self._moments, video, self.tiles)
        mean, logvar = moments.float().chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents B 4 F' h w, as `encode` gives them, to video B 3 F H W in [-1, 1], float32."""
        latents = latents.to(self.device).float() / SCALE
        if self.tiles is None:
            return self._decoded(latents)
        return tiles.decode(self._decoded, latents, self.tiles)

    def _moments(self, video: Tensor) -> Tensor:
        return self.vae.moments(video.to(self.device, self.dtype))

    def _decoded(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents.to(self.dtype)).float()


def load(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> CausalVAE:
    """The VAE of a folder, frozen. ValueError unless its files hold exactly its tensors, and these only finite numbers;
    nothing pickled is run.
    """
    file, config = check_folder(folder), read_config(folder)
    with torch.device("meta"):
        model = CausalVAE(config)
    tensors = read_tensors(file)
    _check_tensors(file, tensors, model.state_dict())
    model = model.to(dtype).to_empty(device=device)
    model.load_state_dict(tensors)  # copies one by one out of the mapped file
    check_finite(model, file)
    return model.eval().requires_grad_(False)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The VAE's tensors by name, of a file or of those that an index names, without what only trained it."""
    if file.name.endswith(".index.json"):
        parts = [file.with_name(name) for name in sorted({*read_json(file)["weight_map"].values()})]
    else:
        parts = [file]
    tensors: dict[str, Tensor] = {}
    for part in parts:
        tensors |= _read_safetensors(part) if part.suffix == ".safetensors" else _choose_weights(part)
    named = {str(name): tensor for name, tensor in tensors.items()}  # a pickle may have numbers for names
    return {name: tensor for name, tensor in named.items() if not name.startswith(TRAINING_ONLY)}


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def _choose_weights(file: Path) -> Mapping[str, Any]:
    """Of a checkpoint the averaged weights, where it has them, as its makers do; else those of the generator."""
    said = _load_pickle(file)
    averaged, trained = said.get("ema_state_dict"), said.get("state_dict")
    if isinstance(averaged, Mapping) and averaged:
        return {str(name).removeprefix("module."): tensor for name, tensor in averaged.items()}
    if isinstance(trained, Mapping):
        generator = trained.get("gen_model", trained)
        return generator if isinstance(generator, Mapping) else {}
    return said


def _load_pickle(file: Path) -> Mapping[str, Any]:
    """A file of torch.save, mapped. Classes and functions that it names are neither imported nor called.

    In place of those of packages that write checkpoints stand objects that do nothing: arguments, random states.
    Raises ValueError for a file that names others, is damaged, or is of the format before torch 1.6.
    """
    way_out = f"download it again, or let `mm-convert convert {file} NEW_FOLDER --to original` write safetensors of it"
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        if refused := [name for name in foreign if name.partition(".")[0] not in WRITERS]:
            raise ValueError(f"it names {', '.join(refused[:3])}, which has no place among weights")
        with torch.serialization.safe_globals([(type("Inert", (Inert,), {}), name) for name in foreign]):
            said = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:  # torch's words tell how to run what is pickled
        raise ValueError(f"{file} cannot be read without running what is pickled in it: {way_out}") from error
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, OSError) as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} cannot be read as weights ({why}); nothing in it was run: {way_out}") from error
    if not isinstance(said, Mapping):
        raise ValueError(f"{file} holds a {type(said).__name__}, not weights by their names")
    return said


class Inert:
    """Stands for an object of a class that a checkpoint names."""

    def __new__(cls, *args: Any, **named: Any) -> Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **named: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _check_tensors(file: Path, found: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless they are exactly those that the model has."""
    fit = "the weights do not belong to this config.json, or the file is incomplete"
    if missing := sorted(wanted.keys() - found.keys()):
        raise ValueError(f"{file} lacks {len(missing)} tensors, first {', '.join(missing[:3])}: {fit}")
    if unknown := sorted(found.keys() - wanted.keys()):
        raise ValueError(f"{file} has {len(unknown)} tensors too many, first {', '.join(unknown[:3])}: {fit}")
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise ValueError(f"{file}: {name} is no dense tensor of floating-point numbers")
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"{file}: {name} is {list(tensor.shape)}, and must be {list(wanted[name].shape)}: {fit}")
