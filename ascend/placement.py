"""Weights on their way to a device, without more memory than they need."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ascend.memory import read_memory

# What is left for activations when the weights stay on the device.
ACTIVATION_SHARE = 0.3


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


def fits(weights: int, resident: int, memory: dict[str, int]) -> bool:
    """Whether a model leaves its activations `ACTIVATION_SHARE` of the device memory that there is for both.

    Args:
        weights: bytes of all the parameters.
        resident: bytes of those that are on the device already.
        memory: of the device, from `read_memory`.
    """
    unused = memory["reserved"] - memory["allocated"]  # held by torch's allocator, as good as free
    return weights <= (memory["free"] + unused + resident) * (1 - ACTIVATION_SHARE)


def place_pipeline(pipe: Any, device: torch.device) -> list[str]:
    """Bring a diffusers pipeline to `device`, in a way that its memory allows and leaves the pictures as they are.

    Where the weights do not fit beside their activations, each component is on the device only while it runs, and the
    VAE decodes one picture at a time. Call it before `compile_pipeline`, which leaves components that move as they
    are, and as often as you like: an earlier offloading is undone.

    Returns:
        What was done, in words.

    Raises:
        RuntimeError: the weights do not fit, and they cannot move, as the forward of a module was replaced.
    """
    modules = [component for component in pipe.components.values() if isinstance(component, torch.nn.Module)]
    parameters = {parameter for module in modules for parameter in module.parameters()}
    weights = sum(parameter.nbytes for parameter in parameters)
    resident = sum(parameter.nbytes for parameter in parameters if parameter.device == device)
    if device.type == "cpu" or fits(weights, resident, read_memory(device)):
        pipe.remove_all_hooks()  # those of an earlier offloading would move the components again
        pipe.to(device, silence_dtype_warnings=True)  # of half precision on the CPU, which runs, if slowly
        return [f"all components are on {device}"]
    _require_own_forwards(pipe)
    pipe.enable_model_cpu_offload(device=device)
    done = [f"components move to {device} in turn: {weights / 2**30:.1f} GiB do not fit at once"]
    if getattr(pipe, "vae", None) is not None:
        pipe.vae.enable_slicing()
        done.append("the VAE decodes one picture at a time")
    return done


def _require_own_forwards(pipe: Any) -> None:
    """Graphs and shared batches replace a forward; accelerate's hooks do too, and are theirs to move."""
    for name, component in pipe.components.items():
        modules = component.modules() if isinstance(component, torch.nn.Module) else ()
        if any(_has_other_forward(module) and not hasattr(module, "_hf_hook") for module in modules):
            raise RuntimeError(
                f"the weights do not fit on the device at once, and those of the {name} cannot move, as it is "
                "compiled or shared: place the pipeline first, or undo that by decompile_pipeline or unshare_guidance"
            )


def _has_other_forward(module: torch.nn.Module) -> bool:
    # accelerate leaves the method of the class behind as an attribute.
    return getattr(module.forward, "__func__", None) is not type(module).forward
