"""The feed-forward of a mixture of experts, of which each token goes through some, without a wait for the device.

`grouped` puts the tokens in the order of their experts, and each expert's rows are a group of one grouped matrix
product, whose sizes stay on the device. `dense` sends all tokens through all experts, where no such product exists.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ascend.device.stand_in import device_for
from processors.kernels import npu_experts
from processors.kernels.low_rank_experts import LowRank, add_low_rank, experts_of_rows

# Where torch's grouped_mm has kernels. For CUDA it promises bfloat16 alone, and torch_npu registers none.
GROUPED_ON = {
    "cpu": (torch.float32, torch.float16, torch.bfloat16),
    "cuda": (torch.bfloat16,),
}
NO_ADAPTERS = LowRank()


class Routing(NamedTuple):
    """Rows in the order of their experts; a row is one of a token's choices.

    Attributes:
        tokens: `[rows]`, the token of each row.
        places: `[tokens, choices]`, the row of each choice.
        ends: `[experts]` int32, where each expert's rows end.
    """

    tokens: torch.Tensor
    places: torch.Tensor
    ends: torch.Tensor


def route(indices: torch.Tensor, experts: int) -> Routing:
    """Where the rows of each token go; shapes depend on none of the values.

    Args:
        indices: `[tokens, choices]`, the experts of each token.
        experts: how many there are.
    """
    choices = indices.shape[-1]
    is_of = indices.flatten() == torch.arange(experts, device=indices.device)[:, None]
    # int32, as the scatter of 310P takes it and not int64
    before = is_of.cumsum(1, dtype=torch.int32)  # along rows that lie beside each other: CUDA scans columns serially
    ends = before[:, -1].cumsum(0, dtype=torch.int32)
    first = ends - before[:, -1]
    places = ((before - 1 + first[:, None]) * is_of).sum(0, dtype=torch.int32).long()
    numbers = torch.arange(len(places), dtype=torch.int32, device=places.device)
    rows = torch.empty_like(numbers).scatter_(0, places, numbers)
    return Routing(rows // choices, places.view(-1, choices), ends)


def expert_feed_forward(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    low_rank: LowRank = NO_ADAPTERS,
) -> torch.Tensor:
    """SwiGLU experts: `sum_c weights[t, c] * down_e(silu(gate_e(x_t)) * up_e(x_t))` with `e = indices[t, c]`.

    Args:
        x: `[tokens, dim]`.
        indices, weights: `[tokens, choices]`, the experts of each token and their shares.
        gate_up: `[experts, 2 * hidden, dim]`, the weights of gate and up one below the other.
        down: `[experts, dim, hidden]`.
        low_rank: what adapters add to both.

    Returns:
        `[tokens, dim]`, in the dtype of `x`.
    """
    groups = x.dtype in GROUPED_ON.get(device_for(x.device).type, ()) or npu_experts.can_group(x, gate_up)
    # Autocast knows linear layers and no grouped products.
    groups = groups and gate_up.dtype == x.dtype and (x.is_meta or not torch.is_autocast_enabled(x.device.type))
    compute = grouped if groups else dense
    return compute(x, indices, weights, gate_up, down, low_rank)


def grouped(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    low_rank: LowRank = NO_ADAPTERS,
) -> torch.Tensor:
    """By grouped matrix products; see `expert_feed_forward`."""
    if device_for(x.device).type == "npu" and npu_experts.has_routing(x.device):
        rows, places, ends = npu_experts.order_rows(x, indices, len(gate_up))
        return npu_experts.combine_rows(_by_expert(rows, ends, gate_up, down, low_rank), places, weights).to(x.dtype)
    routing = route(indices, len(gate_up))
    results = _by_expert(x[routing.tokens], routing.ends, gate_up, down, low_rank)
    return (results[routing.places] * weights[..., None]).sum(1).to(x.dtype)


def _by_expert(
    rows: torch.Tensor, ends: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, low_rank: LowRank
) -> torch.Tensor:
    """What the experts make of rows in their order."""
    is_npu = device_for(rows.device).type == "npu"
    multiply = npu_experts.multiply if is_npu else F.grouped_mm if torch.is_grad_enabled() else grouped_mm
    is_of = experts_of_rows(ends, len(rows)) if any(low_rank) else None
    if is_npu or low_rank.gate_up:
        product = add_low_rank(multiply(rows, gate_up.transpose(1, 2), offs=ends), rows, low_rank.gate_up, is_of)
        hidden = npu_experts.swiglu(product) if is_npu else _swiglu(*product.chunk(2, dim=-1))
    else:  # two products whose results are each in one piece, which the CPU and CUDA read faster
        hidden = _swiglu(*(multiply(rows, weights.transpose(1, 2), offs=ends) for weights in gate_up.chunk(2, dim=1)))
    return add_low_rank(multiply(hidden, down.transpose(1, 2), offs=ends), hidden, low_rank.down, is_of)


@torch.library.custom_op("diffusers_npu::grouped_mm", mutates_args=())
def grouped_mm(x: torch.Tensor, weights: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """torch's own without gradients, also in graphs and on the meta device, where that takes bfloat16 alone."""
    return F.grouped_mm(x, weights, offs=offs)


@grouped_mm.register_fake
def _(x: torch.Tensor, weights: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weights.shape[2])


def dense(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    low_rank: LowRank = NO_ADAPTERS,
) -> torch.Tensor:
    """By all experts, one after the other, with a share of 0 where a token does not choose one.

    With two of four experts that is twice the products; see `expert_feed_forward`.
    """
    result: torch.Tensor | None = None
    for expert in range(len(gate_up)):
        share = (weights * (indices == expert).to(weights.dtype)).sum(1, keepdim=True)
        of_expert = low_rank.of(expert)
        product = add_low_rank(F.linear(x, gate_up[expert]), x, of_expert.gate_up)
        hidden = _swiglu(*product.chunk(2, dim=-1))
        part = _times(add_low_rank(F.linear(hidden, down[expert]), hidden, of_expert.down), share)
        result = part if result is None else _plus(result, part)
    assert result is not None
    return result.to(x.dtype)


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The first is overwritten where nobody wants gradients."""
    if torch.is_grad_enabled():
        return F.silu(gate) * up
    return F.silu(gate, inplace=True).mul_(up)


def _times(new: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """In place where nobody wants gradients: these tensors are the largest of a model."""
    return new * other if torch.is_grad_enabled() or new.dtype != other.dtype else new.mul_(other)


def _plus(new: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return new + other if torch.is_grad_enabled() else new.add_(other)
