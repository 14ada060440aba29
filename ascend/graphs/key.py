"""What a graph is made from, as text: equal keys, equal graphs.

`describe` is of the module, `ambient` of the process and `kind_of` of one argument. The values of parameters are no
part of it: a graph that is kept for other processes reads them from the module.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import numbers
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ascend.graphs.watch import DEPTH, INTERNALS, is_plain_object

PACKAGES = ("torch", "torch_npu", "diffusers", "transformers", "peft")
OUR_PACKAGES = [Path(__file__).parents[2] / name for name in ("ascend", "processors")]
# Where a model came from, and the place of a transformer block, which its first call writes down.
ORIGIN = {"context_name", "_name_or_path", "_commit_hash", "_diffusers_version", "transformers_version"}
NO_SETTINGS = (INTERNALS | ORIGIN) - {"training"}
BY_VERSION = {*PACKAGES, *sys.stdlib_module_names} - {"diffusers"}  # of which one version may be patched differently
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum)


def describe(module: nn.Module, device: torch.device | None = None) -> str:
    """A digest of the software, the chip, the code, structure and settings of `module` and its tensors' kinds.

    The chip is that of `device`, where the module itself is by default.

    Settings are the attributes of the submodules and of the objects that they hold, such as attention processors.
    """
    digest = hashlib.sha256(platform(device or next(module.parameters()).device).encode())
    for file in sorted(source_files(module)):
        digest.update(digest_of(file))
    for name, submodule in module.named_modules():
        hooks = [*submodule._forward_pre_hooks.values(), *submodule._forward_hooks.values()]
        settings = "; ".join([*_settings(submodule, DEPTH), *(_text(hook, DEPTH) for hook in hooks)])
        digest.update(f"{name} {_name(type(submodule))} {settings}\n".encode())
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} {_format(tensor)}\n".encode())
    return digest.hexdigest()


def platform(device: torch.device) -> str:
    """The versions of all that compiles and runs a graph, and the chip."""
    versions = [f"Python {sys.version}", *(f"{package} {_version(package)}" for package in PACKAGES)]
    if device.type == "npu":
        npu = torch.get_device_module("npu")
        versions += [f"CANN {npu.utils.get_cann_version()}", npu.get_device_name(device)]
    return ", ".join(versions)


def ambient(device_type: str) -> tuple[Any, ...]:
    """The settings of the process and thread that decide how a call is computed."""
    autocast = torch.is_autocast_enabled(device_type)
    settings = (
        device_type,
        autocast and torch.get_autocast_dtype(device_type),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.is_inference_mode_enabled(),
        (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else None,
    )
    if device_type != "npu":
        return settings
    npu = torch.get_device_module("npu")
    return *settings, npu.matmul.allow_hf32, npu.conv.allow_hf32


def kind_of(leaf: Any) -> Any:
    """What of an argument a graph depends on: of a tensor its shape, strides, dtype, place and format, else the value.

    Raises:
        TypeError: an object that has no value of its own, whose changes would go unseen.
    """
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), tuple(leaf.stride()), leaf.dtype, leaf.device.type, _format(leaf)
    if isinstance(leaf, (*PLAIN, slice)):
        return type(leaf).__name__, str(leaf) if isinstance(leaf, slice) else leaf
    raise TypeError(f"a compiled module takes tensors, numbers and text, not {type(leaf).__name__}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _format(tensor: torch.Tensor) -> int | None:
    if tensor.device.type != "npu":
        return None
    import torch_npu

    return torch_npu.get_npu_format(tensor)


def _settings(holder: object, depth: int) -> Iterator[str]:
    for name, value in sorted(vars(holder).items()):
        if name not in NO_SETTINGS:
            yield f"{name}={_text(value, depth)}"


def _text(value: Any, depth: int) -> str:
    """`value` without what differs between two processes, such as addresses."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return f"tensor {value.dtype} {tuple(value.shape)}"
    if isinstance(value, functools.partial):
        return f"{_text(value.func, depth)} of {_text([value.args, value.keywords], depth)}"
    if callable(value) and hasattr(value, "__qualname__"):
        return _name(value) + _bound(value)
    if isinstance(value, numbers.Number):  # NumPy's, which are plain to no one else
        return repr(value)
    if depth and isinstance(value, dict):
        items = sorted(f"{key}={_text(item, depth - 1)}" for key, item in value.items() if key not in NO_SETTINGS)
        return f"{_name(type(value))}{items}"
    is_leaf = isinstance(value, list | tuple | set | frozenset) and all(isinstance(item, PLAIN) for item in value)
    if (depth or is_leaf) and isinstance(value, list | tuple | set | frozenset):
        texts = [_text(item, depth - 1) for item in value]
        return f"{_name(type(value))}{texts if isinstance(value, list | tuple) else sorted(texts)}"
    if depth and is_plain_object(value):
        return f"{_name(type(value))}({'; '.join(_settings(value, depth - 1))})"
    return _name(type(value))


def _bound(function: Any) -> str:
    """The plain values that a function computes with beside its arguments: of its closure and defaults."""
    cells = [_content(cell) for cell in getattr(function, "__closure__", None) or ()]
    named = getattr(function, "__kwdefaults__", None) or {}
    values = [*cells, *(getattr(function, "__defaults__", None) or ()), *named.values()]
    texts = [repr(value) for value in values if isinstance(value, (*PLAIN, numbers.Number))]
    return f" with {texts}" if texts else ""


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _name(code: Any) -> str:
    return f"{getattr(code, '__module__', None)}.{getattr(code, '__qualname__', None)}"


def source_files(module: nn.Module) -> set[Path]:
    """Our code, that of the submodules and of the objects and functions that they hold, and the files beside it, which
    may help it."""
    holders: set[Any] = set()
    for submodule in module.modules():
        values = vars(submodule).values()
        holders |= {type(submodule), *map(type, values), *(value for value in values if hasattr(value, "__code__"))}
        holders |= _registered_functions(submodule)
    modules = {sys.modules.get(holder.__module__) for holder in holders if hasattr(holder, "__module__")}
    folders = {Path(source).parent for source in map(_source_of, modules) if source}
    ours = [file for package in OUR_PACKAGES for file in package.rglob("*.py")]
    return {file for folder in folders for file in folder.glob("*.py")} | set(ours)


def _source_of(module: ModuleType | None) -> str | None:
    """The file of a module, unless a version stands for its code."""
    is_known = module is None or module.__name__.partition(".")[0] in BY_VERSION
    return None if is_known else getattr(module, "__file__", None)


def _registered_functions(module: nn.Module) -> set[Callable[..., Any]]:
    """The attention of a model of transformers, which its configuration names and a table holds."""
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if not isinstance(implementation, str):
        return set()
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    function = ALL_ATTENTION_FUNCTIONS.get(implementation)
    return set() if function is None else {function}


@functools.cache
def digest_of(file: Path) -> bytes:
    return hashlib.sha256(file.name.encode() + file.read_bytes()).digest()
