"""Each switch of the presets: whether a target can have it, doing it, what shows it, and its inverse.

A function takes the target and the device on which it computes, and returns what shows that the switch is on, and what
takes it back: None where it was on before, as then it is not the preset's to take. What takes it back may not hold the
target, which would live for ever.
"""

from collections.abc import Callable, Iterator
from operator import methodcaller
from typing import Any, TypeAlias

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from ascend.device import best_dtype
from ascend.graphs.compile import compile_module, compile_pipeline, decompile_module, decompile_pipeline, is_compiled
from ascend.pipelines import PIPELINES
from ascend.planner import PlanError, Request, apply_plan, plan_memory
from ascend.streaming import stop_streaming, stream_module
from processors.models.components import components_of
from processors.models.linear_layers import LinearLayers
from processors.presets.table import CACHE_INTERVAL, MERGE_RATIO
from processors.quantization import dequantize_weights, quantize_weights
from processors.switches import (
    disable_fused_kernels,
    disable_token_merging,
    enable_fused_kernels,
    enable_token_merging,
    merging_ratios,
    uses_fused_kernels,
)

Target: TypeAlias = DiffusionPipeline | nn.Module
Undo = Callable[[Any], None]
Done = tuple[str, Undo | None]
ON_BEFORE = "on before"
CHECKPOINTING = (
    ("enable_gradient_checkpointing", "disable_gradient_checkpointing"),  # of diffusers' models
    ("gradient_checkpointing_enable", "gradient_checkpointing_disable"),  # of transformers'
)


class Unsupported(Exception):
    """The target, or the device, cannot have a switch; the message says why."""


def fuse_kernels(target: Target, device: torch.device) -> Done:
    """See `enable_fused_kernels`; of each model alone, so that one that has it keeps its choice of kernels."""
    before: list[str] = []
    done: dict[str, str] = {}
    refusals: list[str] = []
    for name, model in components_of(target).items():
        if uses_fused_kernels(model):
            before.append(name)
            continue
        try:
            (done[name],) = enable_fused_kernels(model).values()
        except ValueError as refusal:
            refusals.append(f"{name}: {refusal}")
    if not done and not before:
        raise Unsupported("; ".join(refusals) or "there is no model")

    def undo(target: Target) -> None:
        for name in done.keys() & components_of(target).keys():
            disable_fused_kernels(components_of(target)[name])

    return _words({name: ON_BEFORE for name in before} | done), undo if done else None


def merge_tokens(target: Target, device: torch.device) -> Done:
    ratios = merging_ratios(target)
    if ratios:
        return f"{ON_BEFORE}: {len(ratios)} self-attentions merge {max(ratios):.0%} of their tokens", None
    try:
        return _words(enable_token_merging(target, MERGE_RATIO)), disable_token_merging
    except ValueError as refusal:
        raise Unsupported(refusal) from refusal


def keep_interval(target: Target, device: torch.device) -> Done:
    """See `set_cache_interval` of the fork's UNet."""
    unet = _unet(target)
    if unet is None:
        raise Unsupported("DeepCache is for a UNet2DConditionModel, and there is none")
    if unet.cache_interval > 1:
        return f"{ON_BEFORE}: unet.cache_interval is {unet.cache_interval}", None
    try:
        unet.set_cache_interval(CACHE_INTERVAL)
    except ValueError as refusal:
        raise Unsupported(refusal) from refusal
    return f"unet.cache_interval is {CACHE_INTERVAL}", lambda target: _unet(target).set_cache_interval(1)


def lower_precision(target: Target, device: torch.device) -> Done:
    """The device's best dtype: autocast for a model that trains, whose weights stay, else the weights themselves.

    The weights that there were wait in host memory.
    """
    dtype = best_dtype(device)
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float32:
        raise Unsupported(f"float32 is the best dtype on {device}")
    if _trains(target):
        return _autocast(target, device, dtype)
    _require_at_rest(target)
    originals = {
        key: tensor.detach().to("cpu", copy=True)
        for key, tensor in _tensors(target)
        if tensor.is_floating_point() and tensor.dtype != dtype
    }
    if not originals:
        return f"{ON_BEFORE}: all weights are {name}", None
    for key, tensor in _tensors(target):
        if key in originals:
            tensor.data = tensor.data.to(dtype)

    def undo(target: Target) -> None:
        for key, tensor in _tensors(target):
            if key in originals:
                tensor.data = originals[key].to(tensor.device)

    return f"{len(originals)} tensors are {name}", undo


def _autocast(target: Target, device: torch.device, dtype: torch.dtype) -> Done:
    assert isinstance(target, nn.Module)
    if "forward" in vars(target):
        raise Unsupported(f"the forward of {type(target).__name__} was replaced")
    target.forward = torch.autocast(device.type, dtype)(target.forward)

    def undo(target: Any) -> None:
        del target.forward

    return f"forward computes under autocast of {str(dtype).removeprefix('torch.')}", undo


def quantize(target: Target, device: torch.device) -> Done:
    """See `quantize_weights`. The weights that there were wait in host memory."""
    if device.type == "cpu":
        raise Unsupported("the float weights wait in host memory, which would hold more and not less")
    if _trains(target):
        raise Unsupported("integer weights cannot be trained")
    models = components_of(target)
    found = {name: LinearLayers.of(model) for name, model in models.items()}
    if any(layers.quantized for layers in found.values()):
        return f"{ON_BEFORE}: {_words({name: layers.words() for name, layers in found.items()})}", None
    originals = {
        (component, name): layer.weight for component, layers in found.items() for name, layer in layers.plain.items()
    }
    try:
        shown = quantize_weights(target)
    except ValueError as refusal:
        raise Unsupported(refusal) from refusal
    for weight in originals.values():
        weight.data = weight.data.cpu()

    def undo(target: Target) -> None:
        dequantize_weights(target)
        models = components_of(target)
        for (component, name), weight in originals.items():
            layer: Any = models[component].get_submodule(name)
            weight.data = weight.data.to(layer.weight.device)
            layer.weight = weight

    return _words(shown), undo


def lay_channels_last(target: Target, device: torch.device) -> Done:
    if device.type == "npu":
        raise Unsupported("an NPU's convolutions have layouts of their own, which torch_npu chooses")
    _require_at_rest(target)
    keys = {key for key, tensor in _tensors(target) if _has_layout(tensor, torch.contiguous_format)}
    if not keys:
        if any(_has_layout(tensor, torch.channels_last) for _, tensor in _tensors(target)):
            return f"{ON_BEFORE}: no weight of a convolution has another layout", None
        raise Unsupported("there is no convolution whose weights have a layout")
    _lay(target, keys, torch.channels_last)
    shown = f"the weights of {len(keys)} convolutions are channels_last"
    return shown, lambda target: _lay(target, keys, torch.contiguous_format)


def _has_layout(tensor: torch.Tensor, layout: torch.memory_format) -> bool:
    """Whether it has this layout and not the other as well, as kernels of one pixel have."""
    others = {torch.contiguous_format, torch.channels_last} - {layout}
    return (
        tensor.dim() == 4
        and tensor.is_contiguous(memory_format=layout)
        and not any(tensor.is_contiguous(memory_format=other) for other in others)
    )


def _lay(target: Target, keys: set[str], layout: torch.memory_format) -> None:
    for key, tensor in _tensors(target):
        if key in keys:
            tensor.data = tensor.data.contiguous(memory_format=layout)


def slice_vae(target: Target, device: torch.device) -> Done:
    """One picture at a time."""
    return _set_on_vae(target, "slicing")


def tile_vae(target: Target, device: torch.device) -> Done:
    """One tile of a large picture at a time."""
    return _set_on_vae(target, "tiling")


def _set_on_vae(target: Target, what: str) -> Done:
    vae = _vae(target)
    if vae is None:
        raise Unsupported("there is no VAE")
    if getattr(vae, f"use_{what}"):
        return f"{ON_BEFORE}: vae.use_{what}", None
    getattr(vae, f"enable_{what}")()
    return f"vae.use_{what}", lambda target: getattr(_vae(target), f"disable_{what}")()


def checkpoint_gradients(target: Target, device: torch.device) -> Done:
    if not _trains(target):
        raise Unsupported("nothing is trained: no parameter of a model in training mode wants a gradient")
    if getattr(target, "is_gradient_checkpointing", False):
        return f"{ON_BEFORE}: is_gradient_checkpointing", None
    for on, off in CHECKPOINTING:
        if hasattr(target, on):
            try:
                getattr(target, on)()
            except ValueError as refusal:
                raise Unsupported(refusal) from refusal
            return "is_gradient_checkpointing", methodcaller(off)
    raise Unsupported(f"{type(target).__name__} has no gradient checkpointing")


def stream(target: Target, device: torch.device) -> Done:
    """The denoiser of a pipeline, or a model, streamed; the rest as the planner chooses."""
    if device.type == "cpu":
        raise Unsupported("the CPU computes in host memory, where weights are anyway")
    if _trains(target):
        raise Unsupported("a streamed model cannot train")
    _require_at_rest(target)
    homes = {
        name: parameter.device
        for name, model in components_of(target).items()
        if (parameter := next(model.parameters(), None)) is not None
    }
    if isinstance(target, nn.Module):
        try:
            buffers = stream_module(target, device).buffers
        except ValueError as refusal:
            raise Unsupported(refusal) from refusal
        shown = f"{type(target._hf_hook).__name__} hook on {device}"
    else:
        try:
            plan = plan_memory(target, device, _usual_request(target), _dtype(target), mode="stream")
        except (PlanError, KeyError) as refusal:
            raise Unsupported(refusal) from refusal
        target.to("cpu", silence_dtype_warnings=True)
        buffers = apply_plan(target, plan, device)
        shown = _words({placement.name: placement.where for placement in plan.placements})

    def undo(target: Target) -> None:
        if isinstance(target, nn.Module):
            stop_streaming(target)
        else:
            target.remove_all_hooks()
        buffers.drop()
        for name, model in components_of(target).items():
            if name in homes:
                model.to(homes[name])

    return shown, undo


def compile_graphs(target: Target, device: torch.device) -> Done:
    if _trains(target):
        raise Unsupported("graphs are for inference")
    if isinstance(target, nn.Module):
        if is_compiled(target):
            return f"{ON_BEFORE}: {type(target).__name__} is compiled", None
        try:
            return compile_module(target), decompile_module
        except RuntimeError as refusal:
            raise Unsupported(refusal) from refusal
    if not any(kind.__name__ in PIPELINES for kind in type(target).__mro__):
        raise Unsupported(f"which models of a {type(target).__name__} run in every step is not known")
    if is_compiled(target.unet):
        return f"{ON_BEFORE}: the UNet is compiled", None
    try:
        how = compile_pipeline(target)
    except RuntimeError as refusal:
        raise Unsupported(refusal) from refusal
    if set(how.values()) == {"eager"}:
        raise Unsupported("no model is where its weights stay")
    return _words(how), decompile_pipeline


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


def _words(report: dict[str, str]) -> str:
    return "; ".join(f"{name}: {words}" for name, words in report.items())


def _unet(target: Target) -> Any:
    unets = [model for model in components_of(target).values() if hasattr(model, "set_cache_interval")]
    return unets[0] if unets else None


def _vae(target: Target) -> Any:
    vaes = [model for model in components_of(target).values() if hasattr(model, "use_slicing")]
    return vaes[0] if vaes else None


def _trains(target: Target) -> bool:
    is_model = isinstance(target, nn.Module)
    return is_model and target.training and any(parameter.requires_grad for parameter in target.parameters())


def _tensors(target: Target) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers, each once, by the name of the component and their own."""
    seen = set()
    for component, model in components_of(target).items():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{component}.{name}", tensor


def _require_at_rest(target: Target) -> None:
    for name, model in components_of(target).items():
        if any(hasattr(module, "_hf_hook") for module in model.modules()):
            raise Unsupported(f"hooks move the weights of {name} already")


def _dtype(pipe: DiffusionPipeline) -> torch.dtype:
    return next(next(iter(components_of(pipe).values())).parameters()).dtype


def _usual_request(pipe: DiffusionPipeline) -> Request:
    """A picture of the size that the model was trained for."""
    size = getattr(_unet(pipe), "config", {}).get("sample_size") or 64
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return Request(height * pipe.vae_scale_factor, width * pipe.vae_scale_factor)
