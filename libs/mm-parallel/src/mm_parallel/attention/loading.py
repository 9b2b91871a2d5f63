"""Kernels that a program loads into torch, once: FlashAttention 3 and 4, behind the ops of 2.

torch keeps one of them for the whole process.
So this is for programs, before their first step, and no library calls it.
"""

import torch
from torch.nn import attention as _torch

IMPLEMENTATIONS = {"flash3": "FA3", "flash4": "FA4"}
_PACKAGES = {"flash3": "flash_attn_interface, built from source", "flash4": "pip install --pre flash-attn-4"}


def loaded() -> str | None:
    """What stands behind torch's flash ops: FA3, FA4, or None for FlashAttention 2."""
    return _torch.current_flash_attention_impl()


def activate(name: str, device_type: str = "cuda") -> None:
    """Makes torch ready for the kernel that a user named (`mm_parallel.config.AttentionName`); "auto" loads nothing.

    "flash" puts FlashAttention 2 back, where the process had loaded another.
    On CUDA it also tells `F.scaled_dot_product_attention`, for all in the process that calls it (attention to text,
    text encoders, transformers' classes): cuDNN only where it was named, for in some shapes it is wrong and in each new
    one slow; nothing quicker than what was named.
    Raises ValueError where torch or the package that it needs is missing.
    """
    if name in IMPLEMENTATIONS and loaded() != IMPLEMENTATIONS[name]:
        try:
            _torch.activate_flash_attention_impl(IMPLEMENTATIONS[name])
        except Exception as error:  # whatever an import of a compiled package raises
            raise ValueError(
                f"attention by {name} cannot be loaded ({_PACKAGES[name]}): {type(error).__name__}: {error}. "
                "Leave it out: auto takes what is there"
            ) from error
    if name == "flash" and loaded():
        _torch.restore_flash_attention_impl()
    if device_type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(name == "cudnn")
        torch.backends.cuda.enable_flash_sdp(name not in ("cudnn", "efficient", "math"))
        torch.backends.cuda.enable_mem_efficient_sdp(name != "math")
