"""Step caching of HiDream's transformer by diffusers' own cache hooks: most steps leave most blocks out.

`first_block` computes the first block in each step and leaves the others out while that block's change since the last
full step is below a threshold. The norm is compared on the host: one wait for the device in each step.

`taylorseer` (arXiv 2503.06923) computes one step in N in full and extrapolates the result of the last layer in those
between, by its last two full steps: a fixed schedule, and no wait. The first three steps of editing and of refining
are full ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from diffusers import FirstBlockCacheConfig, HiDreamImageTransformer2DModel, TaylorSeerCacheConfig
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from ascend.graphs.compile import is_one_graph
from processors.models.components import components_of

COUNTER = "diffusers_npu_block_counter"
MOST_STEPS = 20  # between full ones


class StepCache(NamedTuple):
    """A way to leave blocks out.

    Attributes:
        default: its value where none is given.
        config: makes diffusers' configuration of a value, or raises ValueError.
    """

    default: float
    config: Callable[[float], Any]


def _first_block(threshold: float) -> FirstBlockCacheConfig:
    if not 0 < threshold <= 1:
        raise ValueError(f"the threshold of first_block must be above 0 and at most 1, not {threshold:g}")
    return FirstBlockCacheConfig(threshold=threshold)


def _taylorseer(interval: float) -> TaylorSeerCacheConfig:
    if interval != int(interval) or not 2 <= interval <= MOST_STEPS:
        raise ValueError(f"taylorseer's interval must be a whole number from 2 to {MOST_STEPS}, not {interval:g}")
    # Of the last layer's few channels, float32 costs nothing, and not all chips have bfloat16.
    return TaylorSeerCacheConfig(cache_interval=int(interval), use_lite_mode=True, taylor_factors_dtype=torch.float32)


STEP_CACHES = {"first_block": StepCache(0.08, _first_block), "taylorseer": StepCache(3, _taylorseer)}


class BlockCounter(ModelHook):
    """Counts how often a block is computed. It is beneath the hooks of a cache, which leave it out with the block."""

    def __init__(self) -> None:
        super().__init__()
        self.computed = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.computed += 1
        return args, kwargs


def check_step_cache(name: str, value: float | None = None) -> float:
    """The value of the cache `name`, its default if None.

    Raises:
        ValueError: there is no such cache, or the value is out of its range.
    """
    if name not in STEP_CACHES:
        raise ValueError(f"there is no step cache {name!r}: take {' or '.join(STEP_CACHES)}")
    value = STEP_CACHES[name].default if value is None else value
    STEP_CACHES[name].config(value)
    return value


def enable_step_cache(pipe: DiffusionPipeline | nn.Module, name: str, value: float | None = None) -> dict[str, str]:
    """Let HiDream's transformer in `pipe` leave blocks out, until `disable_step_cache`. A refiner is another model.

    Call it after `compile_pipeline(pipe, by_block=True)`. The pipelines forget what was cached at the end of a call,
    and where texts, sizes, adapters or the number of branches change. Of a streamed transformer all blocks are still
    brought to the device: transfers are not saved. Where devices share a picture's branches, `first_block` decides for
    each device's branches, so that results are not those of one device.

    Args:
        name: one of `STEP_CACHES`.
        value: the threshold of `first_block`, 0.08 if None; the interval of `taylorseer`, 3 if None.

    Returns:
        What was done, by the component's name.

    Raises:
        ValueError: there is no such cache or transformer, the value is out of range, or a cache is on already.
        RuntimeError: a transformer is compiled as a whole.
    """
    value = check_step_cache(name, value)
    found = dict(_transformers(pipe))
    if not found:
        raise ValueError(f"{type(pipe).__name__} has no HiDreamImageTransformer2DModel, whose steps can be cached")
    for component, model in found.items():
        if model.is_cache_enabled:
            raise ValueError(f"the {component} has a step cache already: disable_step_cache(pipe) ends it")
        if is_one_graph(model):
            raise RuntimeError(
                f"the {component} is compiled as a whole, and a graph cannot leave blocks out: decompile it, then "
                "compile it with by_block=True"
            )
    for model in found.values():
        for block in blocks_of(model):
            HookRegistry.check_if_exists_or_initialize(block).register_hook(BlockCounter(), COUNTER)
        model.enable_cache(STEP_CACHES[name].config(value))
    return {component: f"{name}:{value:g}" for component in found}


def disable_step_cache(pipe: DiffusionPipeline | nn.Module) -> None:
    """Undo `enable_step_cache`; does nothing where it was not called."""
    for _, model in _transformers(pipe):
        if model.is_cache_enabled:
            model.disable_cache()
        for block in blocks_of(model):
            if hasattr(block, "_diffusers_hook"):
                block._diffusers_hook.remove_hook(COUNTER, recurse=False)


def computed_blocks(model: HiDreamImageTransformer2DModel) -> list[int]:
    """How often each block was computed since `enable_step_cache`; the last is computed in full steps alone."""
    return [block._diffusers_hook.get_hook(COUNTER).computed for block in blocks_of(model)]


def blocks_of(model: HiDreamImageTransformer2DModel) -> list[Any]:
    return [*model.double_stream_blocks, *model.single_stream_blocks]


def _transformers(pipe: DiffusionPipeline | nn.Module) -> Iterator[tuple[str, HiDreamImageTransformer2DModel]]:
    for name, model in components_of(pipe).items():
        if isinstance(model, HiDreamImageTransformer2DModel):
            yield name, model
