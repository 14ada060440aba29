"""Weights of 8 bits for a pipeline, or one of its models: a switch for memory, its inverse, and files of such weights.

Only the weights of Linear layers change, and with them results, a little: see `processors.kernels.quantized`. Before
offloading and compiling, as both hold on to the weights that they find; adapters, fused kernels and token merging may
come before or after.
"""

import os
from pathlib import Path

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from safetensors.torch import save_file

from ascend.placement import load_safetensors
from processors.kernels.quantized import dequantize, install, quantize
from processors.models.components import components_of
from processors.models.linear_layers import LinearLayers


def quantize_weights(pipe: DiffusionPipeline | torch.nn.Module, bits: int = 8) -> dict[str, str]:
    """Store the weights of Linear layers as int8 with a scale for each output channel, half of what 16 bits take.

    An NPU computes with them as they are, in float16 or bfloat16 and without gradients; in all other cases the float
    weight of one layer exists while it computes. Layers stay what they are in all but the weight, so that the pipeline
    may be moved, cast and switched afterwards. Adapters of peft go on top, loaded before or after, but cannot be
    merged (`fuse_lora` raises; its `safe_fusing` rounds what it adds to whole steps), nor can projections be fused.

    As they are stay convolutions; layers with under 4096 weights; those outside the lists of blocks of a model that
    has some, as the time embedding and the last projection; adapters; weights that another module uses too, or that
    are kept in another dtype than most (transformers keeps some in float32 that overflow in float16); and other
    classes than `nn.Linear`, which may read their weight in other ways. Of the demo model's UNet the small layers are
    1.3 % of the Linear weights and would add more error than all others, and the time embedding is 0.7 % with eight
    times its share of the error: all these save nothing.

    Args:
        pipe: a pipeline, or a model such as a UNet or a text encoder.
        bits: 8.

    Returns:
        What was done in each model, by the component's name, or the model's class, with the bytes of those weights
        before and after, and what was not: "32 Linear layers: 2,097,152 to 1,056,768 bytes; not covered: 46 Conv2d".
        Layers that were quantised before count, and stay as they are.

    Raises:
        ValueError: other `bits`, no layer to quantise, or one whose weight is offloaded or not finite. Nothing has
            changed then.
    """
    if bits != 8:
        raise ValueError(f"weights of {bits} bits: the kernels take 8 only")
    models = components_of(pipe)
    found = {name: LinearLayers.of(model) for name, model in models.items()}
    if not any(layers.plain or layers.quantized for layers in found.values()):
        reports = "; ".join(f"{name}: {layers.words()}" for name, layers in found.items())
        raise ValueError(f"no Linear layer of {type(pipe).__name__} can be quantised ({reports})")
    for component, layers in found.items():
        for name, layer in layers.plain.items():
            _check(f"{component}.{name}", layer)
    for layers in found.values():
        for layer in layers.plain.values():
            quantize(layer)
    return {name: LinearLayers.of(model).words() for name, model in models.items()}


def dequantize_weights(pipe: DiffusionPipeline | torch.nn.Module) -> None:
    """Make ordinary layers of those that `quantize_weights` changed; does nothing where there are none.

    Their weights are those that the quantised layers have computed with, in the dtype of the model. The original ones
    are gone: to have them back, load the model again.
    """
    for model in components_of(pipe).values():
        for layer in LinearLayers.of(model).quantized:
            dequantize(layer)


def save_quantized(model: torch.nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the state of a model, int8 weights and scales among it, as a .safetensors file, whole or not at all.

    Args:
        model: one of `quantize_weights`; of a pipeline, save each.
        path: of the file.
    """
    partial = Path(path).with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, partial)
    partial.replace(path)


def load_quantized(
    model: torch.nn.Module, path: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> torch.nn.Module:
    """Give a model the state that `save_quantized` wrote, in the dtypes in which it was written.

    The float weights need not exist: make the model within accelerate's `init_empty_weights()`, as
    `UNet2DConditionModel.from_config(config)`.

    Args:
        model: of the same configuration.
        path: of the file.
        device: where the weights are to be.

    Returns:
        `model`.

    Raises:
        RuntimeError: the file is of another model. `model` is not to be used then.
    """
    tensors = load_safetensors(path, torch.device(device))
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and f"{name}.scale" in tensors:
            install(layer, tensors[f"{name}.weight"], tensors[f"{name}.scale"])
    model.load_state_dict(tensors, assign=True)
    return model


def _check(name: str, layer: torch.nn.Linear) -> None:
    if layer.weight.is_meta or "forward" in vars(layer):
        raise ValueError(f"{name} is offloaded, its weight comes and goes: quantise before offloading")
    if not torch.isfinite(layer.weight).all():
        raise ValueError(f"{name}.weight has values that are not finite, for which no integer stands")
