"""The time embedding of a UNet, which each residual block projects to its width, projected by few products for all."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

ND, FRACTAL_NZ = 2, 29


class TimeProjections(nn.Module):
    """What blocks of one width add to their first convolutions, its bias included.

    The weights are those of the blocks once more, as buffers that no state dict has.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, blocks: list[Any]) -> None:
        super().__init__()
        self.width = blocks[0].conv1.out_channels
        biases = [block.time_emb_proj.bias + block.conv1.bias for block in blocks]
        weight = torch.cat([_in_format(block.time_emb_proj.weight, ND) for block in blocks])
        self.register_buffer("weight", _in_format(weight, FRACTAL_NZ), persistent=False)
        self.register_buffer("bias", torch.cat(biases), persistent=False)

    def forward(self, embedding: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The activated embedding `[batch, channels]` as `[batch, width]` for each block."""
        return F.linear(embedding, self.weight, self.bias).split(self.width, dim=1)


@torch.no_grad()
def share_time_projections(module: nn.Module, undo: ExitStack) -> None:
    """Give the residual blocks of `module` that take them (`takes_time_projections`) one projection for each width.

    A graph that computes few blocks, as of a shallow step of DeepCache, projects for all of their width and no more.
    The blocks read it where they are compiled, as `time_projections[time_part]`, and their own weights elsewhere.
    """
    by_width: dict[int, list[Any]] = defaultdict(list)
    parts: list[Any] = list(module.modules())
    for block in parts:
        if getattr(block, "takes_time_projections", False) and block.may_share_time_projection():
            by_width[block.conv1.out_channels].append(block)
    for blocks in by_width.values():
        if len(blocks) > 1:
            projections = TimeProjections(blocks)
            for part, block in enumerate(blocks):
                block.time_projections, block.time_part = projections, part
                undo.callback(delattr, block, "time_projections")
                undo.callback(delattr, block, "time_part")


def _in_format(weight: torch.Tensor, number: int) -> torch.Tensor:
    import torch_npu

    return torch_npu.npu_format_cast(weight.detach(), number)
