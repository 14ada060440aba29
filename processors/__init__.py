"""Attention processors of diffusers for Ascend NPUs, and token merging."""

from processors.attn_processor import AttnProcessor2_0
from processors.install import (
    disable_flash_attention,
    disable_token_merging,
    enable_flash_attention,
    enable_token_merging,
)
from processors.kernels import attention
from processors.tome_processor import AttnProcessor2_0Tome

__all__ = [
    "AttnProcessor2_0",
    "AttnProcessor2_0Tome",
    "attention",
    "disable_flash_attention",
    "disable_token_merging",
    "enable_flash_attention",
    "enable_token_merging",
]
