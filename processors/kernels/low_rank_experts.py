"""What low-rank adapters add to a mixture of experts, as products beside those of the experts' own weights.

Each row goes through the factors of all experts, and those that are not its own are set to 0: with ranks of tens that
is one narrow product where groups would be several, and about 3 % of the experts' work for HiDream's four at rank 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Factor(NamedTuple):
    """An adapter of one expert: `b @ a` beside its weight.

    Attributes:
        expert: its number.
        a: `[rank, in]`.
        b: `[out, rank]`, with the adapter's scale in it.
    """

    expert: int
    a: torch.Tensor
    b: torch.Tensor


class LowRank(NamedTuple):
    """Adapters in effect, beside the weights of gate and up one below the other, and beside those of down."""

    gate_up: Sequence[Factor] = ()
    down: Sequence[Factor] = ()

    def of(self, expert: int) -> LowRank:
        """Those of one expert."""
        return LowRank(*(tuple(factor for factor in factors if factor.expert == expert) for factors in self))


def add_low_rank(
    result: torch.Tensor, x: torch.Tensor, factors: Sequence[Factor], is_of: torch.Tensor | None = None
) -> torch.Tensor:
    """`result[row] + b @ a @ x[row]`, summed over the factors of the row's expert; in place.

    Args:
        result: `[rows, out]`.
        x: `[rows, in]`, in whose dtype is computed.
        factors: of any experts.
        is_of: `[rows, experts]` boolean, which expert each row is of; None where all factors are of all rows.
    """
    if not factors:
        return result
    inner = F.linear(x, torch.cat([factor.a for factor in factors]).to(x.dtype))
    if is_of is not None:
        wanted = [is_of[:, factor.expert, None].expand(-1, len(factor.a)) for factor in factors]
        inner = inner * torch.cat(wanted, dim=1).to(x.dtype)
    b = torch.cat([factor.b for factor in factors], dim=1).to(x.dtype)
    return result.addmm_(inner, b.t())


def experts_of_rows(ends: torch.Tensor, rows: int) -> torch.Tensor:
    """`[rows, experts]` boolean, of rows in the order of their experts.

    Args:
        ends: `[experts]`, where each expert's rows end.
    """
    position = torch.arange(rows, dtype=ends.dtype, device=ends.device)[:, None]
    starts = F.pad(ends[:-1], (1, 0))
    return (position >= starts) & (position < ends)
