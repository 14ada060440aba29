"""What replaces parts of a model: kernels of the device, token merging, and weights of 8 bits."""

from processors.kernels.attention import attention
from processors.kernels.call import AttentionCall
from processors.kernels.select import check_kernels, explain, kernel_names
from processors.merging.processor import AttnProcessor2_0Tome
from processors.models.attention_processor import AttnProcessor2_0
from processors.models.hidream_lora import load_adapter
from processors.presets import PRESETS, Report, disable, enable
from processors.quantization import dequantize_weights, load_quantized, quantize_weights, save_quantized
from processors.step_cache import STEP_CACHES, disable_step_cache, enable_step_cache
from processors.switches import (
    disable_flash_attention,
    disable_fused_kernels,
    disable_token_merging,
    enable_flash_attention,
    enable_fused_kernels,
    enable_token_merging,
)

__all__ = [
    "PRESETS",
    "STEP_CACHES",
    "AttentionCall",
    "AttnProcessor2_0",
    "AttnProcessor2_0Tome",
    "Report",
    "attention",
    "check_kernels",
    "dequantize_weights",
    "disable",
    "disable_flash_attention",
    "disable_fused_kernels",
    "disable_step_cache",
    "disable_token_merging",
    "enable",
    "enable_flash_attention",
    "enable_fused_kernels",
    "enable_step_cache",
    "enable_token_merging",
    "explain",
    "kernel_names",
    "load_adapter",
    "load_quantized",
    "quantize_weights",
    "save_quantized",
]
