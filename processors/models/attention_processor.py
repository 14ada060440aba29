"""The processor of diffusers' `Attention` that chooses the kernel of its device."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention

from processors.kernels.attention import attention
from processors.kernels.select import check_kernels


class AttnProcessor2_0:
    """Drop-in for diffusers' processor of the same name, on the kernels of `processors.kernels`.

    Handles self- and cross-attention of `[batch, tokens, channels]` and the image attention of a VAE
    (`[batch, channels, height, width]`, group or spatial normalisation, residual connection), with fused projections
    or without. On a CPU or GPU the result is bit for bit that of diffusers' processor.

    Args:
        kernels: names of the kernels to choose from (`processors.kernel_names`), None for all.

    Raises:
        ValueError: no such kernel.
    """

    # Tells the pipeline that it may project a prompt once for all steps. A subclass that can take it says so again.
    takes_projected_context = True
    takes_fused_projections = True  # tells `fuse_qkv_projections` that it need not replace this one
    replaced: Any = None  # the processor to go back to, where a switch of `processors.switches` put this one

    def __init__(self, kernels: Sequence[str] | None = None) -> None:
        self.kernels = check_kernels(kernels)

    def __repr__(self) -> str:  # diffusers prints it where it refuses
        return "AttnProcessor2_0 of diffusers-npu (disable_flash_attention takes it away)"

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        projected_context: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        context = projected_context or encoder_hidden_states
        return attend(attn, hidden_states, context, attention_mask, temb, self.kernels)


def attend(
    attn: Attention,
    hidden_states: torch.Tensor,
    context: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None,
    attention_mask: torch.Tensor | None,
    temb: torch.Tensor | None,
    kernels: tuple[str, ...] | None,
) -> torch.Tensor:
    """What `AttnProcessor2_0` computes; `context` is what to attend over, or its keys and values, None for itself."""
    residual = hidden_states
    if attn.spatial_norm is not None:
        hidden_states = attn.spatial_norm(hidden_states, temb)
    image_shape = hidden_states.shape
    if hidden_states.ndim == 4:
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

    query, key, value = _project(attn, hidden_states, context)
    if attention_mask is not None:
        batch, tokens, _ = key.shape
        heads = 1 if len(attention_mask) == batch else attn.heads  # one mask for all heads, or one for each
        attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
        attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])[:, :heads]

    query = _normalize_heads(attn.norm_q, query, attn.heads)
    key = _normalize_heads(attn.norm_k, key, attn.heads)
    hidden_states = attention(query, key, value, attn.heads, attention_mask, kernels=kernels)
    for layer in attn.to_out:  # the projection and dropout
        hidden_states = layer(hidden_states)

    if len(image_shape) == 4:
        hidden_states = hidden_states.transpose(-1, -2).reshape(image_shape)
    if attn.residual_connection:
        hidden_states = hidden_states + residual
    return hidden_states if attn.rescale_output_factor == 1 else hidden_states / attn.rescale_output_factor


def _project(
    attn: Attention, hidden_states: torch.Tensor, context: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, ...]:
    """Query, key and value, by the fused projections where there are some and no LoRA, which these do not have."""
    fused = attn.fused_projections and not any(
        hasattr(layer, "base_layer") for layer in (attn.to_q, attn.to_k, attn.to_v)
    )
    if isinstance(context, tuple):
        return attn.to_q(hidden_states), *context
    if context is None:
        if fused and hasattr(attn, "to_qkv"):
            return attn.to_qkv(hidden_states).chunk(3, dim=-1)
        context = hidden_states
    elif attn.norm_cross:
        context = attn.norm_encoder_hidden_states(context)
    query = attn.to_q(hidden_states)
    if fused and hasattr(attn, "to_kv"):
        return query, *attn.to_kv(context).chunk(2, dim=-1)
    return query, attn.to_k(context), attn.to_v(context)


def _normalize_heads(norm: torch.nn.Module | None, projected: torch.Tensor, heads: int) -> torch.Tensor:
    return projected if norm is None else norm(projected.unflatten(-1, (heads, -1))).flatten(2)
