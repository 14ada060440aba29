"""The forward of a module as torchair graphs, one for each kind of call, kept on disk for the next process.

`torchair.inference.cache_compile` compiles a method once and reads the result back later, without guards: it never
asks whether a call is like the one that was compiled, nor what the module was then. Here each kind of call has a graph
of its own, in a directory whose name is a digest of all that the graph was made from.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import inspect
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

MOST_GRAPHS = 16  # of a module: more kinds of calls take turns, read back from the directory
SET_BY_CALLS = {"context_name"}  # the place of a transformer block, which its first call writes down
PACKAGES = ("torch", "torch_npu", "diffusers", "transformers")

Key = tuple[pytree.TreeSpec, tuple[Any, ...]]


class StaticGraphs:
    """Calls a module's forward as static graphs.

    Processors, token merging and the like must be installed before; parameters may no longer change.

    Args:
        module: on an NPU, its weights in the formats that the graphs are to read.
        config: torchair's compiler configuration.
        directory: where the compiled graphs are kept.
    """

    def __init__(self, module: nn.Module, config: Any, directory: Path):
        self.module = module
        self.config = config
        self.directory = directory
        self.compilations = 0  # graphs that were not in the directory
        self._forward = module.forward
        self._description = describe(module)
        self._graphs: OrderedDict[Key, Callable[..., Any]] = OrderedDict()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        key = structure, tuple(_kind(leaf) for leaf in leaves)
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = self._compile(key, leaves)
            if len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return graph(tensors)

    def _compile(self, key: Key, leaves: list[Any]) -> Callable[..., Any]:
        from torchair.inference import cache_compile

        digest = hashlib.sha256(repr((self._description, key)).encode()).hexdigest()[:32]
        directory = self.directory / f"{type(self.module).__name__}-{digest}"
        self.compilations += not any(directory.rglob("compiled_module"))
        call = _Call(self.module, self._forward, key[0], leaves)
        # torchair and dynamo tell compiled methods apart by their code, which all instances of a class share.
        code = _Call.forward.__code__.replace(co_name=f"forward_{digest}")
        forward = types.MethodType(types.FunctionType(code, globals()), call)
        graph = cache_compile(forward, config=self.config, dynamic=False, cache_dir=str(directory), ge_cache=True)
        return lambda tensors: _restore(*graph(*tensors))


class _Call(nn.Module):
    """One kind of call of a module: its tensors are the arguments, all else is constant."""

    def __init__(
        self, module: nn.Module, forward: Callable[..., Any], structure: pytree.TreeSpec, leaves: list[Any]
    ) -> None:
        super().__init__()
        self.module = module
        self.call = forward
        self.structure = structure
        self.is_tensor = [isinstance(leaf, torch.Tensor) for leaf in leaves]
        self.constants = [None if is_tensor else leaf for leaf, is_tensor in zip(leaves, self.is_tensor, strict=True)]

    def forward(self, *tensors: torch.Tensor) -> tuple[Any, tuple[str, ...], str, str]:
        """The results, and for those of a class with named fields these names and the class, as cached code cannot
        name a class itself."""
        remaining = iter(tensors)
        pairs = zip(self.is_tensor, self.constants, strict=True)
        leaves = [next(remaining) if is_tensor else constant for is_tensor, constant in pairs]
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        results = self.call(*args, **kwargs)
        if isinstance(results, dict):  # as the outputs of diffusers and transformers are
            return tuple(results.values()), tuple(results.keys()), type(results).__module__, type(results).__name__
        return results, (), "", ""


def _restore(values: Any, fields: tuple[str, ...], module: str, name: str) -> Any:
    if not fields:
        return values
    return getattr(importlib.import_module(module), name)(**dict(zip(fields, values, strict=True)))


def _kind(leaf: Any) -> Any:
    """What of an argument a graph depends on."""
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), tuple(leaf.stride()), leaf.dtype, leaf.device.type
    return type(leaf).__name__, leaf


def describe(module: nn.Module) -> str:
    """A digest of what the graphs of `module` are made from: software, chip, code, structure and settings.

    Settings are the plain attributes of the submodules and of the objects that they hold, such as attention
    processors. The values of the parameters are not part of it: a cached graph reads them from the module.
    """
    digest = hashlib.sha256()
    digest.update(_platform().encode())
    for directory in sorted({Path(__file__).parent, *(file.parent for file in _source_files(module))}):
        for file in sorted(directory.glob("*.py")):
            digest.update(file.read_bytes())
    for name, submodule in module.named_modules():
        digest.update(f"{name} {type(submodule).__qualname__} {'; '.join(_settings(submodule))}\n".encode())
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {_format(tensor)}\n".encode())
    return digest.hexdigest()


def _platform() -> str:
    versions = [f"{package} {importlib.metadata.version(package)}" for package in PACKAGES]
    return ", ".join([*versions, torch.get_device_module("npu").get_device_name()])


def _format(tensor: torch.Tensor) -> int:
    import torch_npu

    return torch_npu.get_npu_format(tensor)


def _settings(holder: object, depth: int = 2) -> Iterator[str]:
    config = getattr(holder, "config", None)  # of diffusers and transformers: what the constructor was given
    values = vars(holder) | (
        {} if config is None else {"config": config if isinstance(config, dict) else vars(config)}
    )
    for name, value in sorted(values.items()):
        if name.startswith("_") or name in SET_BY_CALLS:
            continue
        if isinstance(value, dict):
            value = sorted((key, item) for key, item in value.items() if not str(key).startswith("_"))
        if isinstance(value, (bool, int, float, str, tuple, list, torch.dtype, type(None))):
            yield f"{name}={value!r}"
        elif depth > 1 and hasattr(value, "__dict__") and not isinstance(value, (nn.Module, torch.Tensor)):
            yield f"{name}={type(value).__qualname__}({'; '.join(_settings(value, depth - 1))})"


def _source_files(module: nn.Module) -> set[Path]:
    """The files with the code of the submodules and of the objects that they hold; their neighbours may help them."""
    holders: set[type] = set()
    for submodule in module.modules():
        holders |= {type(submodule), *(type(value) for value in vars(submodule).values())}
    files = set()
    for holder in holders:
        source = getattr(sys.modules.get(holder.__module__), "__file__", None)
        if source and not holder.__module__.startswith(("torch.", "builtins")):
            files.add(Path(inspect.getfile(holder)) if inspect.isclass(holder) else Path(source))
    return files
