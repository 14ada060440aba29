"""A plan for a pipeline on a device, from its folder or from itself, and carrying it out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from safetensors.torch import load_file
from torch import nn

from ascend.chips import TORCH_ATTENTION, has_operator
from ascend.device.discovery import find_device
from ascend.device.properties import get_chip
from ascend.device.stand_in import standing_for
from ascend.memory import read_memory
from ascend.planner.activations import record_call, tensors_in
from ascend.planner.activity import FROM_DISK, LENT, RESIDENT, STREAMED, Part, Run, Weights, total
from ascend.planner.allocator import Event
from ascend.planner.calls import HIDREAM_TOKENS, Call, Request, UnknownCallError, as_called, calls_of
from ascend.planner.models import cast_floats, class_of, load_on_meta, longest_text, to_meta
from ascend.planner.plan import MemoryPlan, PlanError, choose_plan
from ascend.planner.speed import measure_speed
from ascend.streaming import Buffers, find_blocks, lend_module, stream_module
from ascend.streaming.blocks import aligned, bytes_of, tensors_of
from ascend.streaming.buffers import BUFFERS
from ascend.streaming.stream import shared_tensors

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LARGEST_BLOCK = 2**28  # bytes: two of them are little beside activations, and long enough for the link's full rate
MODES = {"auto": None, "resident": (RESIDENT,), "stream": (STREAMED,), "disk": (FROM_DISK,)}
HALVES = ("encoder", "decoder")
# Of components that are not known, by a part of their names.
OTHER_PHASES = {"text": "encode", "vae": "decode", "image": "encode", "safety": "decode"}


def plan_memory(
    source: DiffusionPipeline | Path | str,
    device: torch.device | str,
    request: Request,
    dtype: torch.dtype,
    steps: int = 50,
    mode: str = "auto",
    limit: int | None = None,
    fused_attention: bool | None = None,
    prepare: Callable[[nn.Module], object] | None = None,
) -> MemoryPlan:
    """Choose where each model of a pipeline is to be on `device`; nothing is loaded.

    Args:
        source: a folder in diffusers' layout, of which configurations are read, or a pipeline, wherever its models
            are. A compiled one is planned as if it were not.
        request: what is drawn; a pipeline that edits is planned with an image, and its sizes are the image's.
        dtype: in which the models run.
        mode: a key of MODES; all but "auto" say where the denoiser is.
        limit: bytes of device memory, by default what is free and what the pipeline's weights have there.
        fused_attention: whether attention's scores are never in memory as a whole. By default on devices where
            torch's own attention is fused; 310P wants `enable_fused_kernels`.
        prepare: what is done to each model before it is placed and changes what it takes. Here it is done to copies
            without values.

    Raises:
        PlanError: no placement fits, or the dry run of a model fails.
        ValueError: there is no such `mode`, or no such picture.
    """
    if isinstance(source, str):
        source = Path(source)
    device = find_device(device) if isinstance(device, str) else device
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    if request.height < 8 or request.width < 8 or request.height % 8 or request.width % 8 or request.batch < 1:
        raise ValueError(f"{request} is no picture: sides are multiples of 8, and there is at least one")
    folder = source if isinstance(source, Path) else None
    request = as_called(class_of(source) if isinstance(source, Path) else type(source).__name__, request)
    if request.text_tokens is None:
        request = request._replace(text_tokens=min(longest_text(source), HIDREAM_TOKENS))
    models = load_on_meta(source, dtype) if isinstance(source, Path) else modules_of(source)
    if fused_attention is None:
        fused_attention = device.type != "npu" or has_operator(get_chip(device), TORCH_ATTENTION)
    bare = {name: to_meta(model) for name, model in models.items()}

    def parts_of(is_mapped: bool) -> list[Part]:
        ready = {name: prepared(model, prepare, is_mapped) for name, model in bare.items()} if prepare else bare
        with standing_for(device):
            return [part_of(name, ready, request, dtype, fused_attention) for name in ready]

    memory = read_memory(device)
    if limit is None:
        held = {id(tensor): tensor.nbytes for model in models.values() for tensor in tensors_on(device, model)}
        limit = memory["free"] + memory["reserved"] - memory["allocated"] + sum(held.values())
    host = read_memory(torch.device("cpu"))["free"]
    speed = partial(measure_speed, device, folder)
    is_auto = mode == "auto"
    try:
        plan = choose_plan(parts_of(mode == "disk"), limit, host, steps, speed, MODES[mode], keeps_blocks=is_auto)
    except PlanError:
        if not (prepare and is_auto):
            raise
    else:
        if not (prepare and is_auto and any(placement.where == FROM_DISK for placement in plan.placements)):
            return plan
    return choose_plan(
        parts_of(True), limit, host, steps, speed, MODES["disk"]
    )  # what is mapped is prepared otherwise


def prepared(model: nn.Module, prepare: Callable[[nn.Module], object], is_mapped: bool) -> nn.Module:
    """A copy of a model without values to which `prepare` was applied, as to one whose weights are those of files."""
    model = copy.deepcopy(model)
    vars(model)["_hf_hook"] = SimpleNamespace(is_mapped=is_mapped)
    prepare(model)
    return model


def modules_of(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def tensors_on(device: torch.device, model: nn.Module) -> list[torch.Tensor]:
    """None on the CPU, whose memory is never a pipeline's alone."""
    return [tensor for tensor in tensors_of(model) if tensor.device == device and device.type != "cpu"]


def part_of(
    name: str, models: dict[str, nn.Module], request: Request, dtype: torch.dtype, fused_attention: bool
) -> Part:
    """What the component `name` of `models`, which are on the meta device, takes.

    Raises:
        PlanError: its dry run fails.
    """
    model = models[name]
    try:
        calls = calls_of(model, models, request, dtype)
        runs = [dry_run(call, model, fused_attention) for call in calls]
    except UnknownCallError as reason:
        phase = next((phase for part, phase in OTHER_PHASES.items() if part in name), "denoise")
        return Part(name, weights_of(model), (run_of(Call(phase, {}), model, []),), str(reason))
    except Exception as error:  # of any kind: processors and layers may be the user's
        raise PlanError(
            f"the {name} cannot be planned, as a dry run of it on the meta device fails: {error!r}; pipe.to(device) "
            "or enable_model_cpu_offload of diffusers place it without a plan"
        ) from error
    return Part(name, weights_of(model), tuple(runs))


def dry_run(call: Call, model: nn.Module, fused_attention: bool) -> Run:
    if call.cast:
        model = copy.deepcopy(model)
        cast_floats(model, call.cast)
    return run_of(call, model, record_call(call.target(model), call.inputs, fused_attention))


def weights_of(model: nn.Module) -> Weights:
    blocks = find_blocks(model, LARGEST_BLOCK)
    shared = shared_tensors(model, list(blocks.values()))
    own = {name: [t for t in tensors_of(block) if id(t) not in shared] for name, block in blocks.items()}
    owner = {id(tensor): name for name, tensors in own.items() for tensor in tensors}
    halves = [getattr(model, half) for half in HALVES] if is_halved(model) else []
    lent = {id(tensor) for half in halves or [model] for tensor in tensors_of(half)}
    tensors = in_order_of_moving(model)
    return Weights(
        tuple(tensor.nbytes for tensor in tensors),
        tuple((owner.get(id(tensor)), tensor.nbytes) for tensor in tensors_of(model)),
        tuple(tensor.nbytes for tensor in tensors if id(tensor) not in lent),
        {name: sizes_by_dtype(each) for name, each in own.items()},
    )


def bytes_while_streamed(model: nn.Module) -> int:
    """Of a streamed model on its device: what is in no block, and both buffers."""
    weights = weights_of(model)
    return total(weights.around) + BUFFERS * total(weights.block.values())


def run_of(call: Call, model: nn.Module, events: list[Event]) -> Run:
    """What a call of `model`, in the dtype that it is cast to, takes."""
    target = call.target(model)
    return Run(
        call.phase,
        events,
        tuple(tensor.nbytes for tensor in tensors_in(call.inputs)),
        tuple(sizes_by_dtype(tensors_of(target)).values()),
        {name: bytes_of(block) for name, block in find_blocks(target, LARGEST_BLOCK).items()},
        weights_of(model) if call.cast else None,
    )


def in_order_of_moving(model: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers, each once, as `model.to` takes them: those of its children first."""
    found: dict[int, torch.Tensor] = {}
    for child in model.children():
        found |= {id(tensor): tensor for tensor in in_order_of_moving(child)}
    own = (*model.parameters(recurse=False), *model.buffers(recurse=False))
    return list((found | {id(tensor): tensor for tensor in own}).values())


def sizes_by_dtype(tensors: Iterable[torch.Tensor]) -> dict[torch.dtype, int]:
    """Bytes of a buffer for each dtype, as `HostCopy` lays it out."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + aligned(tensor.nbytes)
    return sizes


def is_halved(model: nn.Module) -> bool:
    """A pipeline calls the encoder and the decoder of a VAE, and not the VAE."""
    return all(hasattr(model, half) for half in HALVES)


class Executes(ModelHook):
    """Tells a pipeline where a model runs that is not hooked otherwise."""

    def __init__(self, device: torch.device) -> None:
        self.execution_device = device


def apply_plan(
    pipe: DiffusionPipeline, plan: MemoryPlan, device: torch.device | str, folder: Path | str | None = None
) -> Buffers:
    """Bring the models of `pipe` to where `plan` says.

    `pipe.remove_all_hooks()` undoes it, after which `pipe.to` brings all to one device.

    Args:
        pipe: in host memory.
        folder: in diffusers' layout, of whose files those components' weights are mapped that come from disk.

    Raises:
        ValueError: a component is to come from disk, and `folder` has its weights in another dtype, or not at all.
    """
    device = find_device(device) if isinstance(device, str) else device
    folder = None if folder is None else Path(folder)
    remove_hooks(pipe)
    buffers = Buffers(device)
    try:
        for name, model in modules_of(pipe).items():
            where = plan.where(name)
            if where == FROM_DISK:
                map_weights(model, name, folder)
            place(model, where, device, buffers, plan.kept(name))
    except BaseException:
        remove_hooks(pipe)
        raise
    return buffers


def remove_hooks(pipe: DiffusionPipeline) -> None:
    """As `pipe.remove_all_hooks()`, and of parts of models whose whole has none, as the halves of a VAE."""
    pipe.remove_all_hooks()
    for model in modules_of(pipe).values():
        remove_hook_from_module(model, recurse=True)


def place(model: nn.Module, where: str, device: torch.device, buffers: Buffers, kept: Collection[str]) -> None:
    if where == RESIDENT:
        model.to(device)
        add_hook_to_module(model, Executes(device))
        return
    halves = [getattr(model, half) for half in HALVES] if is_halved(model) else []
    for part in halves or [model]:
        if where == LENT:
            lend_module(part, device)
        else:
            stream_module(part, device, buffers, LARGEST_BLOCK, where == FROM_DISK, kept_now(part, kept))
    if halves:
        for name, child in model.named_children():
            if name not in HALVES:
                child.to(device)
        add_hook_to_module(model, Executes(device))


def kept_now(model: nn.Module, kept: Collection[str]) -> list[str]:
    """The blocks of `model` that are those of a plan, or parts of them: adapters may have it cut otherwise since."""
    return [
        name for name in find_blocks(model, LARGEST_BLOCK) if any(f"{name}.".startswith(f"{each}.") for each in kept)
    ]


def map_weights(model: nn.Module, name: str, folder: Path | None) -> None:
    """Let the weights of `model` be views of the files that they came from."""
    if folder is None:
        raise ValueError(f"the {name} is to come from disk: apply_plan wants the folder of the model's files")
    files = sorted((folder / name).glob("*.safetensors"))
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
