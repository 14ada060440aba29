"""The switches of presets that change weights, and give back those that there were.

What there was is kept for the very tensors and layers, by identity: names and places change when adapters are loaded,
models compiled, or a pipeline is given another model.
"""

import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

from ascend.device import best_dtype
from ascend.streaming.blocks import tensors_of
from processors.kernels.quantized import QuantizedLinear, dequantize
from processors.models.components import components_of
from processors.models.linear_layers import LinearLayers
from processors.presets.target import (
    ON_BEFORE,
    Done,
    Target,
    Unsupported,
    require_at_rest,
    require_inference,
    trains,
    undone_if_it_fails,
    words_of,
)
from processors.quantization import quantize_weights

logger = logging.getLogger(__name__)

Place: TypeAlias = Callable[[], torch.Tensor | None]


def lower_precision(target: Target, device: torch.device) -> Done:
    """The device's best dtype: autocast for a model that trains, whose weights stay, else the weights themselves.

    Of each model those in its usual dtype; what stands in another is meant to, as what overflows in float16. The
    weights that there were wait in host memory.
    """
    dtype = best_dtype(device)
    if dtype == torch.float32:
        raise Unsupported(f"float32 is the best dtype on {device}")
    if trains(target) and isinstance(target, nn.Module):
        return _autocast(target, device, dtype)
    require_inference(target)
    require_at_rest(target)
    casts = [Cast(model, dtype) for model in components_of(target).values()]

    def undo() -> None:
        for cast in casts:
            cast.undo()

    with undone_if_it_fails(undo):
        for cast in casts:
            cast.apply()
    number = sum(len(cast.originals) for cast in casts)
    name = str(dtype).removeprefix("torch.")
    if not number:
        return f"{ON_BEFORE}: weights are {name}", None
    return f"{number} tensors are {name}", undo


class Cast:
    """The weights of one model in another dtype, and those that there were."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.dtype, self.model = dtype, weakref.ref(model)
        places = {id(find()): find for find in _places(model)}
        tensors = [tensor for tensor in tensors_of(model) if tensor.is_floating_point()]
        kept = _kept_in_float32(model)
        sizes = Counter[torch.dtype]()
        for tensor in tensors:
            sizes[tensor.dtype] += tensor.numel()
        self.usual = max(sizes, key=sizes.__getitem__, default=dtype)
        self.originals: list[tuple[Place, torch.Tensor]] = []
        self.left: list[Place] = []
        self.wanted: list[Place] = []
        for tensor in tensors:
            stays = tensor.dtype != self.usual or self.usual == dtype or id(tensor) in kept
            (self.left if stays else self.wanted).append(places[id(tensor)])

    def apply(self) -> None:
        for find in self.wanted:
            tensor = find()
            if tensor is not None:
                # On the CPU the very memory: kernels there round by its alignment, which a mapped file decides.
                self.originals.append((find, tensor.data.cpu()))
                tensor.data = tensor.data.to(self.dtype)

    def undo(self) -> None:
        """Values that were changed since are kept, in the dtype of before; so is what came since."""
        changed, known = 0, {id(find()) for find in self.left}
        for find, original in self.originals:
            tensor = find()
            if tensor is None:
                continue
            known.add(id(tensor))
            if tensor.dtype == self.dtype and torch.equal(original.to(self.dtype), tensor.detach().cpu()):
                tensor.data = original.to(tensor.device)
            elif tensor.dtype != original.dtype or not torch.equal(original, tensor.detach().cpu()):
                changed += 1
                tensor.data = tensor.data.to(original.dtype)
        model = self.model()
        if changed:
            logger.warning("%d weights were changed since the preset was enabled: they stay changed", changed)
        for tensor in tensors_of(model) if model is not None and self.usual != self.dtype else ():
            if tensor.dtype == self.dtype and id(tensor) not in known:
                tensor.data = tensor.data.to(self.usual)


def _places(model: nn.Module) -> Iterator[Place]:
    """Finds each parameter and buffer again: a parameter stays itself when a module moves, a buffer its name."""
    for parameter in model.parameters():
        yield weakref.ref(parameter)
    for module in model.modules():
        for name in module._buffers:
            yield partial(_buffer, weakref.ref(module), name)


def _buffer(module: weakref.ref[nn.Module], name: str) -> torch.Tensor | None:
    holder = module()
    return None if holder is None else holder._buffers.get(name)


def _kept_in_float32(model: nn.Module) -> set[int]:
    """Ids of what diffusers and transformers keep so: modules that their class names, and buffers outside of files."""
    names = {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    names |= {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    kept = {id(parameter) for name, parameter in model.named_parameters() if names & set(name.split("."))}
    for module in model.modules():
        kept |= {id(module.get_buffer(name)) for name in module._non_persistent_buffers_set if name in module._buffers}
    return kept


def _autocast(target: nn.Module, device: torch.device, dtype: torch.dtype) -> Done:
    autocast = Autocast(device.type, dtype)
    handles = [
        target.register_forward_pre_hook(autocast.enter),
        target.register_forward_hook(autocast.leave, always_call=True),
    ]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return f"forward computes under autocast of {str(dtype).removeprefix('torch.')}", undo


class Autocast:
    """Hooks around a forward. They hold no model, so that copies of one, as an average's, compute on their own."""

    def __init__(self, device_type: str, dtype: torch.dtype) -> None:
        self.device_type, self.dtype = device_type, dtype
        self.entered: dict[int, list[torch.autocast]] = {}  # of each thread, as calls nest

    def enter(self, module: nn.Module, args: Any) -> None:
        context = torch.autocast(self.device_type, self.dtype)
        context.__enter__()
        self.entered.setdefault(threading.get_ident(), []).append(context)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.entered[threading.get_ident()].pop().__exit__(None, None, None)


def quantize(target: Target, device: torch.device) -> Done:
    """See `quantize_weights`. The weights that there were wait in host memory."""
    if device.type == "cpu":
        raise Unsupported("the float weights wait in host memory, which would hold more and not less")
    require_inference(target)
    found = {name: LinearLayers.of(model) for name, model in components_of(target).items()}
    if any(layers.quantized for layers in found.values()):
        return f"{ON_BEFORE}: {words_of({name: layers.words() for name, layers in found.items()})}", None
    originals = [(weakref.ref(layer), layer.weight) for layers in found.values() for layer in layers.plain.values()]

    def undo() -> None:
        for reference, weight in originals:
            layer: Any = reference()
            if isinstance(layer, QuantizedLinear):
                dequantize(layer)
                weight.data = weight.data.to(layer.weight.device)
                layer.weight = weight

    with undone_if_it_fails(undo):
        try:
            shown = quantize_weights(target)
        except ValueError as refusal:
            raise Unsupported(refusal) from refusal
        for _, weight in originals:
            weight.data = weight.data.cpu()
    return words_of(shown), undo


def lay_channels_last(target: Target, device: torch.device) -> Done:
    if device.type == "npu":
        raise Unsupported("an NPU's convolutions have layouts of their own, which torch_npu chooses")
    require_at_rest(target)
    tensors = [tensor for model in components_of(target).values() for tensor in tensors_of(model)]
    laid = [weakref.ref(tensor) for tensor in tensors if _has_layout(tensor, torch.contiguous_format)]
    if not laid:
        if any(_has_layout(tensor, torch.channels_last) for tensor in tensors):
            return f"{ON_BEFORE}: no weight of a convolution has another layout", None
        raise Unsupported("there is no convolution whose weights have a layout")

    def lay(layout: torch.memory_format) -> None:
        for reference in laid:
            tensor = reference()
            if tensor is not None and tensor.dim() == 4:
                tensor.data = tensor.data.contiguous(memory_format=layout)

    lay(torch.channels_last)
    return f"the weights of {len(laid)} convolutions are channels_last", lambda: lay(torch.contiguous_format)


def _has_layout(tensor: torch.Tensor, layout: torch.memory_format) -> bool:
    """Whether it has this layout and not the other as well, as kernels of one pixel have."""
    other = torch.channels_last if layout == torch.contiguous_format else torch.contiguous_format
    return (
        tensor.dim() == 4
        and tensor.is_contiguous(memory_format=layout)
        and not tensor.is_contiguous(memory_format=other)
    )
