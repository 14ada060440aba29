"""Self-attention on merged tokens."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention

from processors.kernels.select import check_kernels
from processors.merging import npu_tome, tome
from processors.merging.tome import count_merged, match, partition
from processors.models.attention_processor import attend


class AttnProcessor2_0Tome:
    """Self-attention that merges `ratio` of the tokens before it and unmerges its result (arXiv 2303.17604).

    Equals `tomesd.apply_patch(..., use_rand=False)` on the same block. Deterministic. Differentiable in the tokens;
    the choice of those that merge counts as constant.

    Args:
        h, w: grid of the tokens; None takes the grid of each call from the transformer block.
        sy, sx: size of the cells whose top left token is a destination; need not divide h and w.
        ratio: share of the tokens to remove, from 0 to `1 - 1 / (sy * sx)`.
        kernels: names of the attention kernels to choose from, None for all.

    Raises:
        ValueError: `ratio` out of range, no such kernel, one of `h` and `w` without the other, or, when called, tokens
            that are not h x w, no grid, no block input, or an attention mask, which has no meaning for merged tokens.
    """

    takes_block_input = True  # asks diffusers' BasicTransformerBlock for `block_input` and `token_grid`
    takes_fused_projections = True
    replaced: Any = None  # the processor to go back to, where a switch of `processors.switches` put this one

    def __init__(
        self,
        h: int | None = None,
        w: int | None = None,
        sy: int = 2,
        sx: int = 2,
        ratio: float = 0.5,
        kernels: Sequence[str] | None = None,
    ) -> None:
        check_ratio(ratio, sy, sx)
        if (h is None) != (w is None):
            raise ValueError(f"token merging needs both h and w, or neither: got h={h}, w={w}")
        self.grid = None if h is None or w is None else (h, w)
        self.sy, self.sx, self.ratio = sy, sx, ratio
        self.kernels = check_kernels(kernels)

    def __repr__(self) -> str:  # diffusers prints it where it refuses
        return "AttnProcessor2_0Tome of diffusers-npu (disable_token_merging takes it away)"

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        block_input: torch.Tensor | None = None,
        token_grid: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        if block_input is None:
            raise ValueError("token merging needs the block's input: install the patched diffusers (apply_patch.sh)")
        if attention_mask is not None:
            raise ValueError("token merging cannot apply an attention_mask: its tokens are merged")
        h, w = self._grid_of(hidden_states.shape[1], token_grid)
        merged = count_merged(h, w, self.sy, self.sx, self.ratio)
        if merged == 0:
            return attend(attn, hidden_states, encoder_hidden_states, None, temb, self.kernels)
        matching = match(block_input, partition(h, w, self.sy, self.sx, block_input.device), merged)
        operators = npu_tome if npu_tome.is_fused(hidden_states, merged) else tome
        tokens = operators.merge(hidden_states, matching)
        attended = attend(attn, tokens, encoder_hidden_states, None, temb, self.kernels)
        return operators.unmerge(attended, matching)

    def _grid_of(self, tokens: int, token_grid: tuple[int, int] | None) -> tuple[int, int]:
        grid = self.grid or token_grid
        if grid is None:
            raise ValueError("token merging knows no grid: give h and w, or call it from a 2D transformer")
        if grid[0] * grid[1] != tokens:
            raise ValueError(f"token merging on a grid of {grid[0]} x {grid[1]} got {tokens} tokens")
        # Index maps belong to one grid: a graph with dynamic shapes must be compiled for each.
        return operator.index(grid[0]), operator.index(grid[1])


def check_ratio(ratio: float, sy: int = 2, sx: int = 2) -> None:
    """Raise ValueError unless cells of sy x sx can give up `ratio` of their tokens."""
    if sy < 1 or sx < 1:
        raise ValueError(f"token merging needs cells of at least 1 x 1 tokens, got sy={sy}, sx={sx}")
    limit = 1 - 1 / (sy * sx)
    if not 0 <= ratio <= limit:
        raise ValueError(f"token merging with cells of {sy} x {sx} takes a ratio from 0 to {limit:g}, got {ratio}")
