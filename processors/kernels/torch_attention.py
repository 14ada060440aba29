"""Attention of torch itself."""

import torch
import torch.nn.functional as F

from processors.kernels.call import AttentionInputs


def torch_attention(inputs: AttentionInputs) -> torch.Tensor:
    """`F.scaled_dot_product_attention`."""
    output = F.scaled_dot_product_attention(
        *inputs.split_heads(), attn_mask=inputs.attention_mask, is_causal=inputs.is_causal, scale=inputs.scale
    )
    return output.transpose(1, 2).flatten(2)
