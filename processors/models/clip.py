"""CLIP and SigLIP models of transformers on our attention kernels and with the exact GELU."""

from typing import TypeAlias

import torch
import torch.nn.functional as F
from transformers.activations import GELUActivation
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPPreTrainedModel
from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipPreTrainedModel

from processors.kernels.attention import attention

IMPLEMENTATION = "diffusers_npu"
ATTENTIONS = (CLIPAttention, SiglipAttention)
Model: TypeAlias = CLIPPreTrainedModel | SiglipPreTrainedModel


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
    kernels = getattr(module, "kernels", None)
    # A mask that transformers made is causal already.
    output = attention(query, key, value, heads, attention_mask, causal and attention_mask is None, scaling, kernels)
    return output.unflatten(-1, (heads, -1)), None


def is_replaceable(attn: torch.nn.Module) -> bool:
    """Whether `attn` is an attention of theirs that uses transformers' default, torch's attention, or ours already."""
    return isinstance(attn, ATTENTIONS) and attn.config._attn_implementation in ("sdpa", IMPLEMENTATION)


def use_kernels(model: Model, kernels: tuple[str, ...] | None = None) -> None:
    """Let the attentions of `model` that are replaceable attend through `processors.kernels`, by these or by all."""
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, clip_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, sdpa_mask)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(IMPLEMENTATION)
    for module in model.modules():
        if is_replaceable(module):
            module.kernels = kernels


def uses_kernels(model: Model) -> bool:
    """Whether `use_kernels` is in effect."""
    return bool(model.config._attn_implementation == IMPLEMENTATION)


def use_default(model: Model) -> None:
    """Undo `use_kernels`."""
    if model.config._attn_implementation == IMPLEMENTATION:
        model.set_attn_implementation("sdpa")
    for module in model.modules():
        if isinstance(module, ATTENTIONS):
            vars(module).pop("kernels", None)


def exact_gelu(hidden_states: torch.Tensor) -> torch.Tensor:
    """GELU by the error function. On an NPU `F.gelu` is always its tanh approximation; npu_gelu has a derivative."""
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
