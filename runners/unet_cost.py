"""What denoising a picture costs, counted from the model itself: calls of the UNet and their arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from processors import enable_token_merging

PROMPT_TOKENS = 77
GIGA = 1e9


class StepFlops(NamedTuple):
    """Floating-point operations for each row of the batch, a multiplication and an addition counting as two."""

    full: int
    shallow: int


def step_flops(
    config: Mapping[str, Any],
    height: int,
    width: int,
    branch: tuple[int, int] = (0, 0),
    merging: Mapping[str, Any] | None = None,
) -> StepFlops:
    """What a call of the UNet computes, whole and in its outer layers.

    Of matrix products, convolutions and attention. Nothing is computed: tensors of torch's device "meta" have shapes
    only.

    Args:
        config: of the UNet.
        height, width: of the latents.
        branch: where DeepCache cuts.
        merging: what `enable_token_merging` gets, None for no merging.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(config)).eval()
        sample = torch.empty(1, unet.config.in_channels, height, width)
        prompt = torch.empty(1, PROMPT_TOKENS, unet.config.cross_attention_dim)
        timestep = torch.empty((), dtype=torch.int64)
    if merging:
        enable_token_merging(unet, **merging)
    counts = []
    feature = None
    for _ in range(2):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            results = unet(sample, timestep, prompt, cache_branch=branch, cached_feature=feature, return_dict=False)
        feature = feature if feature is not None else results[1]
        counts.append(counter.get_total_flops())
    return StepFlops(*counts)


def picture_cost(
    config: Mapping[str, Any],
    steps: Mapping[str, int],
    calls: int,
    rows: int,
    shallow_rows: int,
    size: tuple[int, int],
    merging: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What one call of a pipeline costs in its UNet, with a cache and without, for the report.

    Args:
        config: of the UNet.
        steps: from `count_steps`; empty without a cache.
        calls: of the UNet without a cache.
        rows, shallow_rows: of the batch in full and in shallow steps, both branches of guidance counted.
        size: height and width of the latents.
        merging: see `step_flops`.
    """
    without = step_flops(config, *size)
    cost = step_flops(config, *size, merging=merging) if merging else without
    plain = calls * rows * without.full
    counted = steps or {"full_steps": calls, "shallow_steps": 0, "skipped_steps": 0}
    full_samples = counted["full_steps"] * rows
    shallow_samples = counted["shallow_steps"] * shallow_rows
    spent = full_samples * cost.full + shallow_samples * cost.shallow
    samples = {"full_samples": full_samples, "shallow_samples": shallow_samples}
    return {**counted, **samples, "gflops": spent / GIGA, "gflops_of_all_steps": plain / GIGA, "share": spent / plain}
