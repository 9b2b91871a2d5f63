"""A small causal VAE with random weights, in the files of the published one: to test with, here and elsewhere."""

import json
from pathlib import Path

import torch

from mm_models.opensoraplan.vae_config import VAEConfig, describe
from mm_models.opensoraplan.vae_model import CausalVAE

TINY = VAEConfig(hidden_size=32, hidden_size_mult=(1, 1, 1, 1), num_res_blocks=1)


def write_vae(folder: Path | str, config: VAEConfig = TINY, seed: int = 0) -> CausalVAE:
    """config.json and checkpoint.ckpt into a folder, which is usually called vae. Returns the VAE."""
    torch.manual_seed(seed)
    vae = CausalVAE(config).eval().requires_grad_(False)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(describe(config)), encoding="utf-8")
    torch.save({"state_dict": {"gen_model": vae.state_dict()}}, folder / "checkpoint.ckpt")
    return vae
