"""The processor of diffusers' `Attention` that chooses the kernel of its device."""

from typing import Any

import torch
from diffusers.models.attention_processor import Attention

from processors.kernels import attention


class AttnProcessor2_0:
    """Drop-in for diffusers' processor of the same name, on the kernels of `processors.kernels`.

    Handles self- and cross-attention of `[batch, tokens, channels]` and the image attention of a VAE
    (`[batch, channels, height, width]`, group or spatial normalisation, residual connection). On a CPU or GPU the
    result is bit for bit that of diffusers' processor.
    """

    takes_projected_context = True  # tells the pipeline that it may project a prompt once for all steps
    replaced: Any = None  # the processor to go back to, where `enable_flash_attention` put this one

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        projected_context: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        if projected_context is not None:
            key, value = projected_context
        else:
            context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            if encoder_hidden_states is not None and attn.norm_cross:
                context = attn.norm_encoder_hidden_states(context)
            key, value = attn.to_k(context), attn.to_v(context)
        if attention_mask is not None:
            batch, tokens, _ = key.shape
            heads = 1 if len(attention_mask) == batch else attn.heads  # one mask for all heads, or one for each
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])[:, :heads]

        query = _normalize_heads(attn.norm_q, attn.to_q(hidden_states), attn.heads)
        key = _normalize_heads(attn.norm_k, key, attn.heads)
        hidden_states = attention(query, key, value, attn.heads, attention_mask)
        for layer in attn.to_out:  # the projection and dropout
            hidden_states = layer(hidden_states)

        if len(image_shape) == 4:
            hidden_states = hidden_states.transpose(-1, -2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states if attn.rescale_output_factor == 1 else hidden_states / attn.rescale_output_factor


def _normalize_heads(norm: torch.nn.Module | None, projected: torch.Tensor, heads: int) -> torch.Tensor:
    return projected if norm is None else norm(projected.unflatten(-1, (heads, -1))).flatten(2)
