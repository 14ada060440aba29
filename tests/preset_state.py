"""What shows that a switch of a preset is on, read from the object itself and not from the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ascend.graphs.blocks import BlockGraphs
from ascend.graphs.static import StaticGraphs
from processors import PRESETS, Report
from processors.models.components import components_of


def _modules(target: Any) -> list[nn.Module]:
    return [module for model in components_of(target).values() for module in model.modules()]


def _processors(target: Any) -> list[str]:
    return [type(module.processor).__name__ for module in _modules(target) if hasattr(module, "processor")]


def _is_lower(target: Any) -> bool:
    dtypes = {parameter.dtype for module in _modules(target) for parameter in module.parameters(recurse=False)}
    seen: list[bool] = []
    if isinstance(target, nn.Module) and target.training:  # what a layer sees while it computes
        layer = next(module for module in _modules(target) if not list(module.children()))
        handle = layer.register_forward_pre_hook(
            lambda *_: seen.append(torch.is_autocast_enabled(next(layer.parameters()).device.type))
        )
        target(torch.zeros(2, 64, device=next(target.parameters()).device))
        handle.remove()
    return any(seen) or bool(dtypes & {torch.float16, torch.bfloat16})


def _is_graph(target: Any) -> bool:
    forwards = [vars(module).get("forward") for module in _modules(target)]
    makers = [getattr(getattr(forward, "func", None), "__self__", forward) for forward in forwards]  # of blocks
    return any(isinstance(maker, StaticGraphs | BlockGraphs) for maker in makers)


def _has_our_processor(target: Any) -> bool:
    processors = [module.processor for module in _modules(target) if hasattr(module, "processor")]
    return any(type(processor).__module__.startswith("processors.") for processor in processors)


def _has_layout(target: Any) -> bool:
    weights = [module.weight for module in _modules(target) if isinstance(module, nn.Conv2d)]
    return any(not weight.is_contiguous() for weight in weights)


def _vae(target: Any, what: str) -> bool:
    return any(getattr(module, what, False) for module in _modules(target))


def _trains_in_checkpoints(target: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in _modules(target))


IS_ON: dict[str, Callable[[Any], bool]] = {
    "fused_kernels": _has_our_processor,
    "token_merging": lambda target: "AttnProcessor2_0Tome" in _processors(target),
    "cache_interval": lambda target: any(getattr(module, "cache_interval", 1) > 1 for module in _modules(target)),
    "mixed_precision": _is_lower,
    "quantized_weights": lambda target: any(
        isinstance(module, nn.Linear) and module.weight.dtype == torch.int8 for module in _modules(target)
    ),
    "channels_last": _has_layout,
    "vae_slicing": lambda target: _vae(target, "use_slicing"),
    "vae_tiling": lambda target: _vae(target, "use_tiling"),
    "gradient_checkpointing": _trains_in_checkpoints,
    "streaming": lambda target: any(
        type(vars(module).get("_hf_hook")).__name__ == "Stream" for module in _modules(target)
    ),
    "graphs": _is_graph,
}


def assert_reported(report: Report, preset: str, target: Any) -> None:
    """Each switch is reported as what it is: on the object if and only if it is "applied"."""
    assert set(report) == set(IS_ON)
    for name, outcome in report.items():
        assert (outcome.status != "not asked for") == (name in PRESETS[preset]), name
        assert (outcome.status == "applied") == IS_ON[name](target), f"{name}: {outcome}"
        assert outcome.reason or outcome.status == "not asked for", name


def assert_all_off(target: Any) -> None:
    assert [name for name, is_on in IS_ON.items() if is_on(target)] == []
