"""The operators of Ascend chips for mixtures of experts: choosing, ordering rows, grouped products, and the way back.

A2 and A3 have one for each; 310P orders rows and brings them back by others, which torchair has no converter for, so
that in its graphs plain indexing does. The operators' pages are in op-plugin, docs/zh/custom_APIs/torch_npu.
"""

from __future__ import annotations

import torch

from ascend.chips import EXPERT_ROUTING, GROUPED_MATMUL, family_of, has_operator
from processors.kernels.call import chip_of

MOST_COLUMNS = 65535  # of an operand of npu_grouped_matmul
COLUMN_MULTIPLE = 16  # of its results on 310P, of weights in private formats on the others
ROW_ORDER = 2  # `drop_pad_mode`: nothing is dropped, and a token's choices are beside each other


def can_group(x: torch.Tensor, gate_up: torch.Tensor) -> bool:
    """Whether the chip of `x`, `[tokens, dim]`, multiplies it in groups, where nobody wants gradients."""
    chip = chip_of(x.device)
    family = family_of(chip)
    if family is None or not has_operator(chip, GROUPED_MATMUL) or torch.is_grad_enabled():
        return False
    dim, hidden = x.shape[1], gate_up.shape[1] // 2
    takes_dtype = x.dtype == torch.float16 if family.saturates else x.dtype in family.dtypes
    fits = max(dim, 2 * hidden) <= MOST_COLUMNS and dim % COLUMN_MULTIPLE == 0 and hidden % COLUMN_MULTIPLE == 0
    return takes_dtype and fits and gate_up.dtype == x.dtype


def can_choose(device: torch.device) -> bool:
    """Whether the chip has an operator for `choose`, and nobody wants gradients."""
    return has_operator(chip_of(device), EXPERT_ROUTING) and not torch.is_grad_enabled()


def choose(logits: torch.Tensor, choices: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best experts of each token and their shares of all, `[tokens, choices]`, from `[tokens, experts]`."""
    shares, experts, _ = torch.ops.npu.npu_moe_gating_top_k_softmax(logits, None, choices)
    return experts, shares


def has_routing(device: torch.device) -> bool:
    """Whether the chip's own operators order rows and bring them back where this is called, in a graph or outside."""
    return has_operator(chip_of(device), EXPERT_ROUTING) or not torch.compiler.is_compiling()


def order_rows(
    x: torch.Tensor, indices: torch.Tensor, experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A row of `x`, `[tokens, dim]`, for each choice, in the order of their experts.

    Returns:
        `[rows, dim]`; the row of each choice, `[rows]` int32; where each expert's rows end, `[experts]`.
    """
    rows, places, ends, _ = torch.ops.npu.npu_moe_init_routing_v2(
        x,
        indices.int(),
        active_num=indices.numel(),
        expert_num=experts,
        expert_tokens_num_type=0,
        expert_tokens_num_flag=True,
        active_expert_range=[0, experts],
    )
    return rows, places, ends


def combine_rows(rows: torch.Tensor, places: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """`sum_c shares[t, c] * rows[places[t, c]]`, `[tokens, dim]`; `places` as `order_rows` returns them."""
    if has_operator(chip_of(rows.device), EXPERT_ROUTING):
        return torch.ops.npu.npu_moe_finalize_routing(
            rows, None, None, None, shares.to(rows.dtype), places, None, drop_pad_mode=ROW_ORDER
        )
    return torch.ops.npu.npu_moe_token_unpermute(rows, places, probs=shares.to(rows.dtype))


def multiply(x: torch.Tensor, weights: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
    """As torch's `grouped_mm`: `[rows, in]` by `[groups, in, out]`, of which the rows end at `offs`, `[groups]`."""
    (product,) = torch.ops.npu.npu_grouped_matmul([x], [weights], group_list=offs.long(), split_item=3, group_type=0)
    return product


def swiglu(hidden: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` of `[rows, 2 * hidden]`, gate and up beside each other."""
    return torch.ops.npu.npu_swiglu(hidden, dim=-1)
