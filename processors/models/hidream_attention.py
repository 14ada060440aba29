"""HiDream's attention on the kernels of its device: fused norms, fused rotary embeddings and our attention."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_hidream_image import HiDreamAttnProcessor, apply_rope, weigh_padding
from torch import nn

from ascend.chips import ROTARY, has_operator
from ascend.device.stand_in import device_for
from processors.kernels.call import chip_of

# That npu_apply_rotary_pos_emb takes: op-plugin, docs/zh/custom_APIs/torch_npu/torch_npu-apply_rotary_pos_emb.md
ROTARY_DIMS = (64, 128)


class FusedHiDreamAttnProcessor(HiDreamAttnProcessor):
    """Computes as diffusers' processor; on an NPU by fewer and fused operators.

    `fuse` makes a processor one, `unfuse` an ordinary one again. Off the NPU the results are the same to the bit.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        hidden_states_masks: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
        padding_columns: tuple[torch.Tensor, torch.Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        streams: list[tuple[Any, ...]] = [
            (hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.q_rms_norm, attn.k_rms_norm)
        ]
        if not attn.single:
            streams.append(
                (encoder_hidden_states, attn.to_q_t, attn.to_k_t, attn.to_v_t, attn.q_rms_norm_t, attn.k_rms_norm_t)
            )
        queries, keys, values = [], [], []
        for x, to_q, to_k, to_v, q_norm, k_norm in streams:
            queries.append(rms_norm(q_norm, to_q(x)).to(x.dtype))
            keys.append(rms_norm(k_norm, to_k(x)).to(x.dtype))
            values.append(to_v(x))
        if hidden_states_masks is not None:
            keys[0] = keys[0] * hidden_states_masks.view(len(hidden_states), -1, 1)
        query, key, value = (
            (torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]).unflatten(-1, (attn.heads, -1))
            for parts in (queries, keys, values)
        )
        query, key = rotate(query, key, image_rotary_emb)
        head_dim = query.shape[-1]
        if padding_columns is not None:
            query, key, value = weigh_padding(query, key, value, *padding_columns)
        out = dispatch_attention_fn(query, key, value, scale=head_dim**-0.5, backend=self._attention_backend)
        out = out[..., :head_dim].flatten(2).to(query.dtype)
        if attn.single:
            return attn.to_out(out)
        tokens = hidden_states.shape[1]
        image, text = out[:, :tokens], out[:, tokens:]
        return attn.to_out(image), attn.to_out_t(text)


def fuse(processor: HiDreamAttnProcessor) -> None:
    """Turn diffusers' processor into a fused one; others stay as they are."""
    if type(processor) is HiDreamAttnProcessor:
        processor.__class__ = FusedHiDreamAttnProcessor


def unfuse(processor: Any) -> None:
    """Undo `fuse`; does nothing to other processors."""
    if type(processor) is FusedHiDreamAttnProcessor:
        processor.__class__ = HiDreamAttnProcessor


def rms_norm(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`norm` of `[..., channels]`, in one kernel on an NPU where it is torch's own and nobody wants gradients."""
    if type(norm) is not nn.RMSNorm or device_for(x.device).type != "npu" or torch.is_grad_enabled():
        return norm(x)
    return torch.ops.npu.npu_rms_norm(x, norm.weight, norm.eps)[0]


def rotate(query: torch.Tensor, key: torch.Tensor, rotary_emb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary embeddings of `[batch, tokens, heads, head_dim]`.

    HiDream rotates pairs of neighbours, and the operator of NPUs the first half against the second. So both are put
    in that order, in which they stay: scores are the same for channels in any order that query and key have in common.
    (The rows of the projections could be in that order at once, but adapters would be merged into rows of another.)

    Args:
        rotary_emb: `[1 or batch, tokens, 1, rotated / 2, 2, 2]`, matrices of `(cos, -sin; sin, cos)`; channels beyond
            `rotated` stay.
    """
    head_dim, rotated = query.shape[-1], 2 * rotary_emb.shape[3]
    fused = has_operator(chip_of(query.device), ROTARY) and rotated == head_dim and head_dim in ROTARY_DIMS
    if not fused or torch.is_grad_enabled():
        if rotated == head_dim:
            return apply_rope(query, key, rotary_emb)
        (query, rest_of_query), (key, rest_of_key) = (t.split([rotated, head_dim - rotated], -1) for t in (query, key))
        query, key = apply_rope(query, key, rotary_emb)
        return torch.cat([query, rest_of_query], dim=-1), torch.cat([key, rest_of_key], dim=-1)
    # The operator writes into its operands, which are copies here.
    query, key = (t.unflatten(-1, (-1, 2)).transpose(-1, -2).contiguous().flatten(-2) for t in (query, key))
    cos, sin = (rotary_emb[..., row, 0].to(query.dtype).repeat(1, 1, 1, 2) for row in (0, 1))
    shape = (len(query), -1, -1, -1)
    rotary = torch.ops.npu.npu_apply_rotary_pos_emb
    return rotary(query, key, cos.expand(shape).contiguous(), sin.expand(shape).contiguous(), "BSND", "half")
