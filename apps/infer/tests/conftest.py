"""A whole diffusers pipeline with random weights, small enough to run in a second and awake to its inputs."""

from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from mm_models.testing import tiny_encoders


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory) -> Path:
    """The directory; head dim 20, so that the three bands of rotary positions differ."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=20, ffn_dim=48, num_layers=3, text_dim=32, rope_max_seq_len=32
    )
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if parameter.ndim == 1 or "scale_shift_table" in name:  # zeros and ones would hide a mix-up
                parameter += 0.2 * torch.randn_like(parameter)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    whole = WanPipeline(scheduler=scheduler, transformer=transformer.eval(), **tiny_encoders(text_dim=32))
    path = tmp_path_factory.mktemp("pipeline") / "tiny"
    whole.save_pretrained(path)
    return path
