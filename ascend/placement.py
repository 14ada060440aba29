"""Weights on their way to a device, without more memory than they need."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ascend.graphs.static import has_hooks_of_diffusers, has_step_cache
from ascend.planner.activity import FROM_DISK
from ascend.planner.calls import Request, usual_request
from ascend.planner.memory_plan import apply_plan, modules_of, plan_memory, remove_hooks
from ascend.planner.plan import PlanError
from ascend.streaming import Stream
from ascend.streaming.blocks import tensors_of

_sliced: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()  # VAEs whose slicing is this module's to undo
UNKNOWN_SHARE = 0.3  # of the memory, for components whose calls are not known


def load_safetensors(path: str | os.PathLike[str], device: torch.device) -> dict[str, torch.Tensor]:
    """Read a .safetensors file, or a folder of them (sharded with an index, or a single file), onto `device`.

    Tensors go one by one, so that host memory holds no second copy of them all.

    Raises:
        FileNotFoundError: the path, or a shard that the index names, does not exist.
        ValueError: the folder holds no .safetensors file, or several and no index.
    """
    tensors = {}
    for file in _shards(Path(path)):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118  safe_open is not a dict
                tensors[name] = shard.get_tensor(name).to(device)
    return tensors


def _shards(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_file():
        return [path]
    files = sorted(path.glob("*.safetensors"))
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        files = [path / name for name in sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))]
    elif len(files) != 1:
        raise ValueError(f"{path} holds {len(files)} .safetensors files and {len(indices)} indices; name the file")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{path} lacks {', '.join(missing)}, which {indices[0].name} names")
    return files


def place_pipeline(
    pipe: Any,
    device: torch.device,
    request: Request | None = None,
    limit: int | None = None,
    fused_attention: bool | None = None,
) -> list[str]:
    """Bring a diffusers pipeline to `device`, in a way that its memory allows and leaves the pictures as they are.

    `plan_memory` says where each component is to be. Where not all of them stay on the device, the VAE decodes one
    picture at a time, too. What components take whose calls are not known is not in the plan: `UNKNOWN_SHARE` of the
    memory is left for it. Call it before `compile_pipeline`, and as often as you like: it undoes what it did before.

    Args:
        request: what is drawn, by default one picture of the size that the pipeline draws by default.
        limit, fused_attention: as for `plan_memory`.

    Returns:
        What was done, in words.

    Raises:
        PlanError: no placement fits, or the dry run of a model fails. What was offloaded is in host memory then.
        RuntimeError: weights would have to move, and cannot, as the forward of a module was replaced, or diffusers'
            group offloading moves them.
    """
    if any(map(has_step_cache, _all_modules(pipe))):
        raise RuntimeError("a step cache is around the blocks: disable_step_cache(pipe), and enable it afterwards")
    if any(map(has_hooks_of_diffusers, _all_modules(pipe))):
        raise RuntimeError("group offloading moves the weights, and cannot be undone: load the pipeline anew")
    if any(hasattr(module, "_hf_hook") for module in _all_modules(pipe)):
        _require_own_forwards(pipe)
        _undo_offloading(pipe)
    vae: Any = getattr(pipe, "vae", None)
    if vae in _sliced:
        vae.disable_slicing()
        _sliced.discard(vae)
    if device.type == "cpu":
        done = [_place_whole(pipe, device)]
        return done if limit is None else [*done, "the limit has no effect: models are in the host's memory"]
    make_plan = partial(
        plan_memory, pipe, device, request or usual_request(pipe), _dtype_of(pipe), fused_attention=fused_attention
    )
    plan = make_plan(limit=limit)
    if plan.unknown:
        plan = make_plan(limit=int(plan.limit * (1 - UNKNOWN_SHARE)))
    left = [
        f"{UNKNOWN_SHARE:.0%} of the memory are left for what the {name} takes beside its weights: {why}"
        for name, why in plan.unknown.items()
    ]
    if plan.is_resident:
        return [_place_whole(pipe, device), *left]
    if any(placement.where == FROM_DISK for placement in plan.placements):
        raise PlanError("host memory does not hold the weights either: apply_plan streams them from a model's folder")
    _require_own_forwards(pipe)
    pipe.to("cpu", silence_dtype_warnings=True)  # first: components change places
    apply_plan(pipe, plan, device)
    done = [f"{placement.name}: {placement.where} ({placement.why})" for placement in plan.placements]
    if not getattr(vae, "use_slicing", True):
        vae.enable_slicing()
        _sliced.add(vae)
        done.append("the VAE decodes one picture at a time")
    return done + left


def _dtype_of(pipe: Any) -> torch.dtype:
    """In which the denoiser computes, or what there is."""
    models = [getattr(pipe, name, None) for name in ("unet", "transformer")] + list(modules_of(pipe).values())
    tensors = (tensor for model in models if model is not None for tensor in tensors_of(model))
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)


def _all_modules(pipe: Any) -> Iterator[torch.nn.Module]:
    for model in modules_of(pipe).values():
        yield from model.modules()


def _undo_offloading(pipe: Any) -> None:
    hooks = [getattr(module, "_hf_hook", None) for module in _all_modules(pipe)]
    remove_hooks(pipe)
    for hook in hooks:
        if isinstance(hook, Stream):
            hook.buffers.drop()


def _place_whole(pipe: Any, device: torch.device) -> str:
    if any(tensor.device != device for model in modules_of(pipe).values() for tensor in tensors_of(model)):
        _require_own_forwards(pipe)
        pipe.to(device, silence_dtype_warnings=True)  # of half precision on the CPU, which runs, if slowly
    return f"all components are on {device}"


def _require_own_forwards(pipe: Any) -> None:
    """Graphs and shared batches replace a forward; accelerate's hooks do too, and are theirs to move."""
    for name, model in modules_of(pipe).items():
        if any(_has_other_forward(module) and not hasattr(module, "_hf_hook") for module in model.modules()):
            raise RuntimeError(
                f"weights have to move, and those of the {name} cannot, as it is compiled or shared: place the "
                "pipeline first, or undo that by decompile_pipeline or unshare_guidance"
            )


def _has_other_forward(module: torch.nn.Module) -> bool:
    # accelerate leaves the method of the class behind as an attribute.
    return getattr(module.forward, "__func__", None) is not type(module).forward
