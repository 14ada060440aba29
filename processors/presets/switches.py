"""Each switch of the presets: whether a target can have it, doing it, what shows it, and its inverse.

A function takes the target and the device on which it computes, and returns what shows that the switch is on, and what
takes it back: None where it was on before, as then it is not the preset's to take. What takes it back acts on the very
models that were changed, as a pipeline may have others by then; it does not keep them alive.
"""

import inspect
import weakref
from collections.abc import Callable
from operator import methodcaller
from typing import Any

import torch
from accelerate.hooks import ModelHook, remove_hook_from_module
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from ascend.graphs.compile import compile_module, compile_pipeline, decompile_module, is_compiled
from ascend.pipelines import PIPELINES, models_at, parts_of
from ascend.planner import MemoryPlan, PlanError, apply_plan, plan_memory
from ascend.planner.calls import usual_request
from ascend.planner.memory_plan import Executes
from ascend.planner.plan import FROM_DISK
from ascend.streaming import Buffers, stop_streaming, stream_module
from processors.models.components import components_of
from processors.presets.table import CACHE_INTERVAL, MERGE_RATIO
from processors.presets.target import (
    ON_BEFORE,
    Done,
    Target,
    Undo,
    Unsupported,
    find_model,
    require_at_rest,
    require_inference,
    trains,
    undone_if_it_fails,
    words_of,
)
from processors.presets.weights import lay_channels_last, lower_precision, quantize
from processors.switches import (
    disable_fused_kernels,
    disable_token_merging,
    enable_fused_kernels,
    enable_token_merging,
    merging_ratios,
    uses_fused_kernels,
)

CHECKPOINTING = (
    ("enable_gradient_checkpointing", "disable_gradient_checkpointing"),  # of diffusers' models
    ("gradient_checkpointing_enable", "gradient_checkpointing_disable"),  # of transformers'
)


def undo_by(function: Callable[[Any], Any], *models: Any) -> Undo:
    """Calls `function` with each of `models` that there still is."""
    references = [weakref.ref(model) for model in models]

    def undo() -> None:
        for reference in references:
            model = reference()
            if model is not None:
                function(model)

    return undo


def fuse_kernels(target: Target, device: torch.device) -> Done:
    """See `enable_fused_kernels`; of each model alone, so that one that has it keeps its choice of kernels."""
    done: dict[str, str] = {}
    refusals: list[str] = []
    models = components_of(target)
    before = [name for name, model in models.items() if uses_fused_kernels(model)]
    new = {name: model for name, model in models.items() if name not in before}
    undo = undo_by(disable_fused_kernels, *new.values())
    with undone_if_it_fails(undo):
        for name, model in new.items():
            try:
                (done[name],) = enable_fused_kernels(model).values()
            except ValueError as refusal:
                refusals.append(f"{name}: {refusal}")
    if not done and not before:
        raise Unsupported("; ".join(refusals) or "there is no model")
    return words_of({name: ON_BEFORE for name in before} | done), undo if done else None


def merge_tokens(target: Target, device: torch.device) -> Done:
    ratios = merging_ratios(target)
    if ratios:
        return f"{ON_BEFORE}: {len(ratios)} self-attentions merge {max(ratios):.0%} of their tokens", None
    try:
        shown = enable_token_merging(target, MERGE_RATIO)
    except ValueError as refusal:
        raise Unsupported(refusal) from refusal
    return words_of(shown), undo_by(disable_token_merging, *components_of(target).values())


def keep_interval(target: Target, device: torch.device) -> Done:
    """See `set_cache_interval` of the fork's UNet, which the pipelines with an argument `cache_interval` read."""
    unet = find_model(target, "set_cache_interval")
    if unet is None:
        raise Unsupported("DeepCache is for a UNet2DConditionModel, and there is none")
    is_model = isinstance(target, nn.Module)
    if not is_model and "cache_interval" not in inspect.signature(type(target).__call__).parameters:
        raise Unsupported(f"{type(target).__name__} has no cache")
    if unet.cache_interval > 1:
        return f"{ON_BEFORE}: unet.cache_interval is {unet.cache_interval}", None
    try:
        unet.set_cache_interval(CACHE_INTERVAL)
    except ValueError as refusal:
        raise Unsupported(refusal) from refusal
    return f"unet.cache_interval is {CACHE_INTERVAL}", undo_by(methodcaller("set_cache_interval", 1), unet)


def slice_vae(target: Target, device: torch.device) -> Done:
    """One picture at a time."""
    return _set_on_vae(target, "slicing")


def tile_vae(target: Target, device: torch.device) -> Done:
    """One tile of a large picture at a time."""
    return _set_on_vae(target, "tiling")


def _set_on_vae(target: Target, what: str) -> Done:
    vae = find_model(target, f"use_{what}")
    if vae is None:
        raise Unsupported("there is no VAE")
    if getattr(vae, f"use_{what}"):
        return f"{ON_BEFORE}: vae.use_{what}", None
    getattr(vae, f"enable_{what}")()
    return f"vae.use_{what}", undo_by(methodcaller(f"disable_{what}"), vae)


def checkpoint_gradients(target: Target, device: torch.device) -> Done:
    name = trains(target)
    if name is None:
        raise Unsupported("nothing is trained: no parameter of a model in training mode wants a gradient")
    model: Any = components_of(target)[name]
    if getattr(model, "is_gradient_checkpointing", False):
        return f"{ON_BEFORE}: is_gradient_checkpointing", None
    for on, off in CHECKPOINTING:
        if hasattr(model, on):
            try:
                getattr(model, on)()
            except ValueError as refusal:
                raise Unsupported(refusal) from refusal
            return f"{name}.is_gradient_checkpointing", undo_by(methodcaller(off), model)
    raise Unsupported(f"{type(model).__name__} has no gradient checkpointing")


def stream(target: Target, device: torch.device) -> Done:
    """The denoiser of a pipeline, or a model, streamed; the rest as the planner chooses."""
    if device.type == "cpu":
        raise Unsupported("the CPU computes in host memory, where weights are anyway")
    require_inference(target)
    require_at_rest(target)
    models = components_of(target)
    if any(is_compiled(model) for model in models.values()):
        raise Unsupported("a graph holds the weights: decompile first")
    homes = [
        (weakref.ref(model), getattr(next(model.parameters(), None), "device", None)) for model in models.values()
    ]
    buffers: list[Buffers] = []
    ours: weakref.WeakSet[ModelHook] = weakref.WeakSet()

    def undo() -> None:
        """Models that were placed otherwise since stay where they are."""
        there = [(model, home) for reference, home in homes if (model := reference()) is not None]
        moved = [(model, home) for model, home in there if any(hook in ours for hook in _hooks_of(model))]
        for model, _ in moved:
            for module in model.modules():
                if vars(module).get("_hf_hook") in ours:
                    _stop_streaming(module)
        for each in buffers:
            each.drop()
        for model, home in moved:
            if home is not None and not _hooks_of(model):
                model.to(home)

    def send_home() -> None:
        for model, _ in ((model, home) for reference, home in homes if (model := reference()) is not None):
            ours.update(_hooks_of(model))  # `require_at_rest` found none before
        undo()

    with undone_if_it_fails(send_home):
        shown = _stream(target, device, buffers)
    for model in models.values():
        ours.update(_hooks_of(model))
    return shown, undo


def _hooks_of(model: nn.Module) -> list[ModelHook]:
    return [vars(module)["_hf_hook"] for module in model.modules() if "_hf_hook" in vars(module)]


def _stop_streaming(module: nn.Module) -> None:
    stop_streaming(module)
    if isinstance(vars(module).get("_hf_hook"), Executes):
        remove_hook_from_module(module)


def _stream(target: Target, device: torch.device, buffers: list[Buffers]) -> str:
    if isinstance(target, nn.Module):
        try:
            buffers.append(stream_module(target, device).buffers)
        except ValueError as refusal:
            raise Unsupported(refusal) from refusal
        return f"{type(target).__name__} is streamed to {device}"
    target.to("cpu", silence_dtype_warnings=True)  # first: what it has of the device is room
    plan = _plan(target, device)
    buffers.append(apply_plan(target, plan, device))
    return words_of({placement.name: placement.where for placement in plan.placements})


def _plan(pipe: DiffusionPipeline, device: torch.device) -> MemoryPlan:
    dtype = next(next(iter(components_of(pipe).values())).parameters()).dtype
    try:
        plan = plan_memory(pipe, device, usual_request(pipe), dtype, mode="stream")
    except (PlanError, ValueError) as refusal:
        raise Unsupported(refusal) from refusal
    if any(placement.where == FROM_DISK for placement in plan.placements):
        raise Unsupported("host memory does not hold the weights, and a preset knows no folder: see apply_plan")
    return plan


def compile_graphs(target: Target, device: torch.device) -> Done:
    require_inference(target)
    if isinstance(target, nn.Module):
        if is_compiled(target):
            return f"{ON_BEFORE}: {type(target).__name__} is compiled", None
        try:
            return compile_module(target), undo_by(decompile_module, target)
        except RuntimeError as refusal:
            raise Unsupported(refusal) from refusal
    if not any(kind.__name__ in PIPELINES for kind in type(target).__mro__):
        raise Unsupported(f"which models of a {type(target).__name__} run in every step is not known")
    parts = parts_of(target)
    new = [model for _, model in models_at(target, parts.each_picture + parts.each_step) if not is_compiled(model)]
    try:
        how = compile_pipeline(target)
    except RuntimeError as refusal:
        raise Unsupported(refusal) from refusal
    made = [model for model in new if is_compiled(model)]
    if set(how.values()) == {"eager"}:
        raise Unsupported("no model is where its weights stay")
    return words_of(how), undo_by(decompile_module, *made) if made else None


APPLY: dict[str, Callable[[Target, torch.device], Done]] = {
    "fused_kernels": fuse_kernels,
    "token_merging": merge_tokens,
    "cache_interval": keep_interval,
    "mixed_precision": lower_precision,
    "quantized_weights": quantize,
    "vae_slicing": slice_vae,
    "vae_tiling": tile_vae,
    "gradient_checkpointing": checkpoint_gradients,
    "streaming": stream,
    "channels_last": lay_channels_last,
    "graphs": compile_graphs,
}
