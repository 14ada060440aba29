"""Attention processors of diffusers for Ascend NPUs, and token merging."""

from processors.kernels.select import attention
from processors.merging.processor import AttnProcessor2_0Tome
from processors.models.attention_processor import AttnProcessor2_0
from processors.switches import (
    disable_flash_attention,
    disable_token_merging,
    enable_flash_attention,
    enable_token_merging,
)

__all__ = [
    "AttnProcessor2_0",
    "AttnProcessor2_0Tome",
    "attention",
    "disable_flash_attention",
    "disable_token_merging",
    "enable_flash_attention",
    "enable_token_merging",
]
