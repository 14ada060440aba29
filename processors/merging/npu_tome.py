"""Token merging by the fused operators of Ascend310P, in place of `merge` and `unmerge` of `processors.merging.tome`.

GE alone has them: in eager mode `npu_tome_merge` returns its inputs as they are, and `npu_tome_unmerge` has no kernel.
torchair passes no rate on but the default, so that they always merge half of the tokens. They are declared in
torchair's `_contrib/custom_torch_ops`; what they compute is in the test of `npu_tome_merge` of Ascend/op-plugin and in
Huawei's stable_diffusion sample.
"""

import torch

from ascend.chips import TOKEN_MERGING, has_operator
from processors.kernels.call import chip_of
from processors.merging.tome import Matching

COPIES = 8  # of the destinations, which the operator's cores sum into; each takes an equal share of what merges
RATE = 0.5


def is_fused(tokens: torch.Tensor, merged: int) -> bool:
    """Whether to merge `merged` of `tokens` `[batch, tokens, channels]` by the fused operators."""
    return (
        torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and tokens.requires_grad)  # they have no derivative
        and tokens.device.type == "npu"
        and tokens.dtype == torch.float16
        and merged == int(tokens.shape[1] * RATE)
        and merged % COPIES == 0
        and has_operator(chip_of(tokens.device), TOKEN_MERGING)
    )


def merge(tokens: torch.Tensor, matching: Matching) -> torch.Tensor:
    """As `processors.merging.tome.merge`; the sums are float16."""
    sources, destinations = (tokens.index_select(1, cells) for cells in matching.cells[:2])
    kept, sums, counts = torch.ops.npu_inference.npu_tome_merge(
        sources, destinations, matching.order, matching.nearest, RATE
    )
    means = sums.sum(1) / counts.sum(1).to(sums.dtype).unsqueeze(-1)
    return torch.cat([kept, means], dim=1)


def unmerge(merged: torch.Tensor, matching: Matching) -> torch.Tensor:
    """As `processors.merging.tome.unmerge`."""
    sources, destinations = (cells.expand(len(merged), -1).contiguous() for cells in matching.cells[:2])
    return torch.ops.npu_inference.npu_tome_unmerge(
        merged, sources, destinations, matching.order, matching.nearest, RATE
    )
