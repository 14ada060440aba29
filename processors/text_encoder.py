"""CLIP models of transformers on our attention kernels and with the exact GELU."""

import torch
import torch.nn.functional as F
from transformers.activations import GELUActivation
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPPreTrainedModel

from processors.kernels import attention

IMPLEMENTATION = "diffusers_npu"


def clip_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention function of transformers: `[batch, heads, tokens, head_dim]` to `[batch, tokens, heads, head_dim]`."""
    if dropout:
        raise ValueError(f"the attention kernels are for inference and have no dropout, got {dropout}")
    causal = bool(module.is_causal) if is_causal is None else is_causal
    heads = query.shape[1]
    query, key, value = (tensor.transpose(1, 2).flatten(2) for tensor in (query, key, value))
    # A mask that transformers made is causal already.
    output = attention(query, key, value, heads, attention_mask, causal and attention_mask is None, scaling)
    return output.unflatten(-1, (heads, -1)), None


def use_kernels(model: CLIPPreTrainedModel) -> None:
    """Let `model` attend through `processors.kernels` if it uses transformers' default, torch's attention."""
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, clip_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, sdpa_mask)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(IMPLEMENTATION)


def use_default(model: CLIPPreTrainedModel) -> None:
    """Undo `use_kernels`."""
    if model.config._attn_implementation == IMPLEMENTATION:
        model.set_attn_implementation("sdpa")


def exact_gelu(hidden_states: torch.Tensor) -> torch.Tensor:
    """GELU by the error function. On an NPU `F.gelu` is always its tanh approximation."""
    if hidden_states.device.type == "npu":
        return torch.ops.npu.npu_gelu(hidden_states, approximate="none")
    return F.gelu(hidden_states)


def use_exact_gelu(activation: GELUActivation) -> None:
    if activation.act is F.gelu:
        activation.act = exact_gelu


def use_default_gelu(activation: GELUActivation) -> None:
    """Undo `use_exact_gelu`."""
    if activation.act is exact_gelu:
        activation.act = F.gelu
