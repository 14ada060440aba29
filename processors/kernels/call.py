"""One attention: what a kernel computes, and what the choice of the kernel depends on."""

from typing import Literal, NamedTuple

import torch

from ascend.device import get_chip
from ascend.device.stand_in import device_for


class AttentionInputs(NamedTuple):
    """What a kernel computes.

    Attributes:
        query: `[batch, query_length, heads * head_dim]`.
        key, value: `[batch, key_length, heads * head_dim]`.
        attention_mask: None, or four-dimensional and broadcasting to `[batch, heads, query_length, key_length]`;
            boolean, True where a query may see a key, or a float bias that is added to the scores.
        is_causal: hide the keys after each query's own position; not together with `attention_mask`.
        scale: factor of the scores, None for `head_dim ** -0.5`.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    heads: int
    attention_mask: torch.Tensor | None
    is_causal: bool
    scale: float | None

    def factor(self) -> float:
        """`scale`, or what None stands for."""
        return (self.query.shape[-1] // self.heads) ** -0.5 if self.scale is None else self.scale

    def split_heads(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value as `[batch, heads, length, head_dim]`."""
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self[:3])
        return query, key, value


class AttentionCall(NamedTuple):
    """All that the choice of a kernel depends on."""

    device_type: str
    chip: str | None
    dtype: torch.dtype
    batch: int
    heads: int
    query_length: int
    key_length: int
    head_dim: int
    mask: Literal["none", "causal", "bool", "float"] = "none"
    mask_heads: int = 1
    needs_grad: bool = False
    kernels: tuple[str, ...] | None = None  # those that the user allows, beside the last one; None: all


def describe(
    inputs: AttentionInputs, needs_grad: bool = False, kernels: tuple[str, ...] | None = None
) -> AttentionCall:
    """What the choice of a kernel for `inputs` depends on; of tensors only shapes, dtype and device."""
    query, mask = inputs.query, inputs.attention_mask
    if mask is None:
        kind: Literal["none", "causal", "bool", "float"] = "causal" if inputs.is_causal else "none"
    else:
        kind = "bool" if mask.dtype == torch.bool else "float"
    return AttentionCall(
        device_type=query.device.type,
        chip=chip_of(query.device),
        dtype=query.dtype,
        batch=query.shape[0],
        heads=inputs.heads,
        query_length=query.shape[1],
        key_length=inputs.key.shape[1],
        head_dim=query.shape[-1] // inputs.heads,
        mask=kind,
        mask_heads=1 if mask is None else mask.shape[1],
        needs_grad=needs_grad,
        kernels=kernels,
    )


def chip_of(device: torch.device) -> str | None:
    """`ascend.device.get_chip`, for code that is compiled; of the meta device that of the one that it stands for."""
    device = device_for(device)
    return _chip(device) if device.type == "npu" else None


@torch.compiler.assume_constant_result
def _chip(device: torch.device) -> str | None:
    return get_chip(device)
