"""Wan2.1 and its relatives: video diffusion transformers."""

from mm_models.wan.blocks import Stream as Stream
from mm_models.wan.config import WanConfig as WanConfig
from mm_models.wan.config import flops as flops
from mm_models.wan.config import train_flops as train_flops
from mm_models.wan.model import WanModel as WanModel
