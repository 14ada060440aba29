# Copyright 2026 The diffusers-npu authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
DeepCache (https://huggingface.co/papers/2312.00858): which layers of a UNet a shallow step runs, and which steps are full.

A branch (block id, layer id) cuts the UNet in two. Block 0 is the outermost down block and the last up block; layer 0 is
the outermost skip connection of that block. A full step runs everything and keeps the hidden states that cross the cut on
the way up; a shallow step runs the near side only and takes them from there.
"""

import math
from typing import TYPE_CHECKING, Sequence

import numpy as np
from torch import nn


if TYPE_CHECKING:
    from .unet_2d_condition import UNet2DConditionModel


BlockCall = tuple[nn.Module, dict[str, slice]]

# Of 50 steps, by how many are full: found by trial on small models at several guidance scales. More full steps go to
# the start, as it takes more of them the stronger the guidance is.
_EARLY = {
    10: (0, 3, 7, 12, 18, 25, 33, 40, 45, 48),
    12: (0, 2, 4, 7, 11, 16, 22, 28, 35, 41, 45, 48),
    14: (0, 2, 4, 6, 8, 11, 15, 20, 25, 30, 36, 42, 46, 48),
}
_EARLY_OF = 50
_FULL_STEPS = 12
_POWER = 1.4  # of the paper
_MIXED = 3  # one step in so many between full ones is shallow

_DIVISIBLE_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")


def check_cache_branch(unet: "UNet2DConditionModel", cache_branch: tuple[int, int]) -> None:
    """Raises `ValueError`, listing the valid branches, when `cache_branch` is not one of this UNet's."""
    valid = {
        block_id: range(len(up_block.resnets))
        for block_id, (down_block, up_block) in enumerate(zip(unet.down_blocks, reversed(unet.up_blocks)))
        if type(down_block).__name__ in _DIVISIBLE_BLOCKS and type(up_block).__name__ in _DIVISIBLE_BLOCKS
    }
    block_id, layer_id = cache_branch
    if layer_id not in valid.get(block_id, ()):
        listing = "; ".join(f"block {b}: layers {list(layers)}" for b, layers in valid.items()) or "none"
        raise ValueError(
            f"This UNet has no cache branch with cache_block_id={block_id} and cache_layer_id={layer_id}."
            f" Valid branches: {listing}."
        )


def plan_block_calls(
    unet: "UNet2DConditionModel", cache_branch: tuple[int, int] | None, is_shallow: bool
) -> tuple[list[BlockCall], list[BlockCall], list[BlockCall]]:
    """
    The blocks that one forward pass calls, each with the keyword arguments that restrict it to some of its layers.

    Returns:
        The calls on the way down, the calls on the way up before the cut, and those after it. Without a `cache_branch`
        the cut lies before the first up block.
    """
    down_calls: list[BlockCall] = [(block, {}) for block in unet.down_blocks]
    up_calls: list[BlockCall] = [(block, {}) for block in unet.up_blocks]
    if cache_branch is None:
        return down_calls, [], up_calls

    check_cache_branch(unet, cache_branch)
    block_id, layer_id = cache_branch
    up_id = len(unet.up_blocks) - 1 - block_id
    up_block = unet.up_blocks[up_id]
    cut = len(up_block.resnets) - 1 - layer_id
    near_calls = [(up_block, {"layers": slice(cut, None)}), *up_calls[up_id + 1 :]]
    if is_shallow:
        return [*down_calls[:block_id], (unet.down_blocks[block_id], {"layers": slice(0, layer_id)})], [], near_calls
    return down_calls, [*up_calls[:up_id], (up_block, {"layers": slice(0, cut)})], near_calls


def get_full_steps(
    num_steps: int,
    cache_interval: int = 1,
    cache_schedule: str | Sequence[int] = "uniform",
    cache_center: int | None = None,
    cache_power: float = _POWER,
    cache_full_steps: int = _FULL_STEPS,
) -> frozenset[int]:
    """
    The indices of the UNet calls that run the whole model.

    Args:
        num_steps (`int`):
            How many times the pipeline calls the UNet: `len(timesteps)`, which PNDM makes one more than its steps.
        cache_interval (`int`):
            One step in `cache_interval` is full.
        cache_schedule (`str` or sequence of `int`):
            `"uniform"`: every `cache_interval`-th step. `"quadratic"`: as many full steps, dense around `cache_center`
            and sparser with the distance d to it as d ** `cache_power` (appendix of the paper); full steps that fall
            together are one. `"early"`: `cache_full_steps`, dense at the start, where guidance decides what the picture
            shows, and at the end. A sequence: the full steps themselves; step 0 must be among them.
        cache_center (`int`, *optional*):
            Defaults to a third of the steps.
        cache_power (`float`):
            1 is uniform.
        cache_full_steps (`int`):
            How many of the steps the schedule `"early"` runs whole, fewer where they would fall together.

    Raises:
        `ValueError`: for an interval below 1, an unknown schedule, a power below 1, a centre or a step out of range,
            and where `cache_center`, `cache_power` or `cache_full_steps` is given to a schedule that has no use for it.
    """
    if cache_interval < 1:
        raise ValueError(f"`cache_interval` must be at least 1, but is {cache_interval}.")
    if cache_schedule != "quadratic" and (cache_center is not None or cache_power != _POWER):
        raise ValueError("`cache_center` and `cache_power` have no effect without `cache_schedule='quadratic'`.")
    if cache_schedule != "early" and cache_full_steps != _FULL_STEPS:
        raise ValueError(f"`cache_full_steps={cache_full_steps}` has no effect without `cache_schedule='early'`.")
    if not isinstance(cache_schedule, str):
        return _explicit_steps(num_steps, cache_schedule)
    if cache_schedule == "uniform":
        return frozenset(range(0, num_steps, cache_interval))
    if cache_schedule == "quadratic":
        return _quadratic_steps(
            num_steps, cache_interval, num_steps // 3 if cache_center is None else cache_center, cache_power
        )
    if cache_schedule == "early":
        return _early_steps(num_steps, cache_full_steps)
    raise ValueError(
        f"`cache_schedule` must be 'uniform', 'quadratic', 'early' or a list of steps, but is {cache_schedule!r}."
    )


def _explicit_steps(num_steps: int, steps: Sequence[int]) -> frozenset[int]:
    outside = [step for step in steps if not 0 <= step < num_steps]
    if outside:
        raise ValueError(f"`cache_schedule` names steps {outside}, but the steps go from 0 to {num_steps - 1}.")
    if 0 not in steps:
        raise ValueError(f"`cache_schedule` must contain step 0, which has nothing to reuse, but is {list(steps)}.")
    return frozenset(steps)


def _quadratic_steps(num_steps: int, interval: int, center: int, power: float) -> frozenset[int]:
    if power < 1:
        raise ValueError(f"`cache_power` must be at least 1, but is {power}.")
    if not 0 <= center < num_steps:
        raise ValueError(f"`cache_center` must lie in 0 to {num_steps - 1}, but is {center}.")
    num_full = math.ceil(num_steps / interval)
    first, last = -(center ** (1 / power)), (num_steps - center) ** (1 / power)
    offsets = [first + (last - first) * k / num_full for k in range(num_full)]
    # The small term keeps a whole number that floating point puts just below itself.
    return frozenset({0} | {int(center + math.copysign(abs(x) ** power, x) + 1e-6) for x in offsets})


def _early_steps(num_steps: int, num_full: int) -> frozenset[int]:
    if num_full < 1:
        raise ValueError(f"`cache_full_steps` must be at least 1, but is {num_full}.")
    known = _EARLY[min(_EARLY, key=lambda count: abs(count - num_full))]
    at = np.linspace(0, len(known) - 1, num_full)
    steps = np.interp(at, np.arange(len(known)), known) * (num_steps - 1) / (_EARLY_OF - 1)
    return frozenset(steps.round().astype(int).tolist())


def plan_between(
    num_steps: int, full_steps: frozenset[int], cache_between: str | Sequence[int] = "shallow"
) -> frozenset[int]:
    """
    The indices of the UNet calls that run its outer layers only. The others that are not full do not run it at all.

    Args:
        num_steps (`int`), full_steps (`frozenset[int]`):
            See `get_full_steps`.
        cache_between (`str` or sequence of `int`):
            `"shallow"`: all that are not full. `"skip"`: none. `"mixed"`: the 1st, 4th, 7th ... after each full one. A
            sequence: the shallow steps themselves.

    Raises:
        `ValueError`: for an unknown name, and for a step out of range or among the full ones.
    """
    between = [step for step in range(num_steps) if step not in full_steps]
    if not isinstance(cache_between, str):
        wrong = sorted(set(cache_between) - set(between))
        if wrong:
            raise ValueError(f"`cache_between` names steps {wrong}, which are full ones or none of the {num_steps}.")
        return frozenset(cache_between)
    if cache_between == "shallow":
        return frozenset(between)
    if cache_between == "skip":
        return frozenset()
    if cache_between == "mixed":
        return frozenset(
            step for step in between if (step - max(full for full in full_steps if full < step)) % _MIXED == 1
        )
    raise ValueError(f"`cache_between` must be 'shallow', 'mixed', 'skip' or a list of steps, but is {cache_between!r}.")
