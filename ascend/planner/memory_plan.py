"""A plan for a pipeline on a device, from its folder or from itself, and carrying it out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from safetensors.torch import load_file
from torch import nn

from ascend.chips import TORCH_ATTENTION, has_operator
from ascend.device import get_chip
from ascend.memory import read_memory
from ascend.planner.activations import activation_peak
from ascend.planner.models import Call, Request, calls_of, load_on_meta
from ascend.planner.plan import FROM_DISK, LENT, RESIDENT, STREAMED, MemoryPlan, Part, choose_plan
from ascend.planner.speed import measure_speed
from ascend.streaming import Buffers, find_blocks, lend_module, stream_module
from ascend.streaming.blocks import bytes_of, tensors_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LARGEST_BLOCK = 2**28  # bytes: two of them are little beside activations, and long enough for the link's full rate
# Of the limit: what the allocator cannot use, as its segments are larger than tensors. SD2.1 streamed on an emulated
# 310P3 fails with 5 % more than its tensors take at their peak, and runs with 10 %.
MARGIN = 0.1
MODES = {"auto": None, "resident": (RESIDENT,), "stream": (STREAMED,), "disk": (FROM_DISK,)}
OTHER_PHASES = {"text": "encode", "vae": "decode", "image": "encode"}  # of components that are not known, by a part


def plan_memory(
    source: DiffusionPipeline | Path,
    device: torch.device,
    request: Request,
    dtype: torch.dtype,
    steps: int = 50,
    mode: str = "auto",
    limit: int | None = None,
    fused_attention: bool | None = None,
) -> MemoryPlan:
    """Choose where each model of a pipeline is to be on `device`; nothing is loaded.

    Args:
        source: a folder in diffusers' layout, of which configurations are read, or a pipeline.
        request: what is drawn.
        dtype: in which the models run.
        mode: a key of MODES; all but "auto" say where the denoiser is.
        limit: bytes of device memory, what is free by default; the plan leaves MARGIN of it to the allocator.
        fused_attention: whether attention's scores are never in memory as a whole. By default on devices where
            torch's own attention is fused; 310P wants `enable_fused_kernels`.

    Raises:
        PlanError: no placement fits.
    """
    folder = source if isinstance(source, Path) else None
    models = load_on_meta(source, dtype) if isinstance(source, Path) else modules_of(source)
    if fused_attention is None:
        fused_attention = device.type != "npu" or has_operator(get_chip(device), TORCH_ATTENTION)
    calls = calls_of(models, request, dtype)
    order = {"encode": 0, "denoise": 1, "decode": 2}
    parts = [part_of(name, model, calls.get(name), fused_attention) for name, model in models.items()]
    memory = read_memory(device)
    if limit is None:
        limit = memory["free"] + memory["reserved"] - memory["allocated"]
    return choose_plan(
        sorted(parts, key=lambda part: order[part.phase]),
        int(limit * (1 - MARGIN)),
        read_memory(torch.device("cpu"))["free"],
        steps,
        measure_speed(device, folder),
        MODES[mode],
    )


def modules_of(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def part_of(name: str, model: nn.Module, call: Call | None, fused_attention: bool) -> Part:
    """The sizes of one component."""
    blocks = list(find_blocks(model, LARGEST_BLOCK).values())
    weights, block = bytes_of(model), max(map(bytes_of, blocks), default=0)
    around = weights - sum(map(bytes_of, blocks))
    if call is None:
        phase = next((phase for part, phase in OTHER_PHASES.items() if part in name), "denoise")
        return Part(name, weights, block, around, phase, None)
    target = call.target(model)
    activations = activation_peak(to_meta(target), call.inputs, fused_attention)
    return Part(name, weights, block, around, call.phase, activations)


def to_meta(model: nn.Module) -> nn.Module:
    """A copy without values, unless it has none."""
    if all(parameter.is_meta for parameter in model.parameters()):
        return model
    memo: dict[int, Any] = {}
    for tensor in tensors_of(model):
        bare = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(bare, False) if isinstance(tensor, nn.Parameter) else bare
    return copy.deepcopy(model, memo)


class Executes(ModelHook):
    """Tells a pipeline where a model runs that is not hooked otherwise."""

    def __init__(self, device: torch.device) -> None:
        self.execution_device = device


def apply_plan(pipe: DiffusionPipeline, plan: MemoryPlan, device: torch.device, folder: Path | None = None) -> Buffers:
    """Bring the models of `pipe` to where `plan` says; `pipe.remove_all_hooks()` undoes it.

    Args:
        pipe: in host memory.
        folder: in diffusers' layout, of whose files those components' weights are mapped that come from disk.

    Raises:
        ValueError: a component is to come from disk, and `folder` has its weights in another dtype, or not at all.
    """
    pipe.remove_all_hooks()
    buffers = Buffers(device)
    try:
        for name, model in modules_of(pipe).items():
            where = plan.where(name)
            if where == FROM_DISK:
                map_weights(model, name, folder)
            place(model, where, device, buffers)
    except BaseException:
        pipe.remove_all_hooks()
        raise
    return buffers


def place(model: nn.Module, where: str, device: torch.device, buffers: Buffers) -> None:
    if where == RESIDENT:
        model.to(device)
        add_hook_to_module(model, Executes(device))
        return
    # A pipeline calls the encoder and the decoder of a VAE, and not the VAE.
    halves = [getattr(model, half) for half in ("encoder", "decoder") if hasattr(model, "decoder")]
    for part in halves or [model]:
        if where == LENT:
            lend_module(part, device)
        else:
            stream_module(part, device, buffers, LARGEST_BLOCK, is_mapped=where == FROM_DISK)
    if halves:
        for name, child in model.named_children():
            if name not in ("encoder", "decoder"):
                child.to(device)
        add_hook_to_module(model, Executes(device))


def map_weights(model: nn.Module, name: str, folder: Path | None) -> None:
    """Let the weights of `model` be views of the files that they came from."""
    files = sorted((folder / name).glob("*.safetensors")) if folder else []
    weights = {key: tensor for file in files for key, tensor in load_file(file).items()}
    wanted = model.state_dict()
    for key, tensor in wanted.items():
        found = weights.get(key)
        if found is None or found.dtype != tensor.dtype:
            what = "lacks it" if found is None else f"has it in {str(found.dtype).removeprefix('torch.')}"
            raise ValueError(
                f"{key} of the {name} cannot come from disk in {str(tensor.dtype).removeprefix('torch.')}: {folder} "
                f"{what}; save_pretrained a pipeline that was loaded in this dtype, once"
            )
    model.load_state_dict({key: weights[key] for key in wanted}, assign=True)
