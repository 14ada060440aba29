"""Graphs for CPUs and CUDA GPUs: torch's inductor."""

from __future__ import annotations

import functools
import gc
import importlib
import shutil
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn

from ascend.graphs.static import Made

LARGE = 2**28  # bytes of weights, from which a call takes so long that compiling for minutes pays


class Inductor:
    """Compiles a large module for speed, a small one to be ready soon.

    The weights of a large module are frozen: packed once into the layouts of the matrix kernels, not in every call.
    They take memory a second time, and inductor's cache on disk does not keep a graph that holds them, so that each
    process compiles again. A small module gains nothing by that. On a CPU its norms are torch's own kernels, nearly as
    fast as inductor's, which would be half of all that is compiled. A module with weights of integers is not frozen:
    inductor would keep the floats that it computes from them, and it was for memory that they became integers.

    Whether weights are frozen is read from a setting of the process, while dynamo traces and inductor compiles; an
    option of `torch.compile` reaches the latter alone and then freezes nothing.

    Raises:
        RuntimeError: there is no C++ compiler.
    """

    name = "inductor"
    prepare_blocks = None

    def __init__(self, device: torch.device) -> None:
        if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
            raise RuntimeError("compiling for the CPU needs a C++ compiler: neither g++ nor clang++ is on the PATH")
        self._is_cpu = device.type == "cpu"
        self._is_large = self._freezes = False  # as blocks are whose weights are arguments
        if self._is_cpu:
            _ready_compiler()

    def prepare(self, module: nn.Module, undo: ExitStack) -> None:
        """Choose; inductor itself brings frozen weights into its layouts, as constants of each graph."""
        self._is_large = sum(tensor.nbytes for tensor in module.parameters()) >= LARGE
        self._freezes = self._is_large and all(tensor.is_floating_point() for tensor in module.parameters())

    def make(self, call: types.MethodType, digest: str, tensors: list[torch.Tensor]) -> Made:
        backend = _compile_soon if self._is_cpu and not self._is_large else "inductor"
        graph = torch.compile(call, backend=backend, fullgraph=True, dynamic=False)
        found = _graphs_found()
        with torch._inductor.config.patch(freezing=self._freezes), _garbage_kept():
            results = graph(*tensors)
        return Made(graph, results, is_new=_graphs_found() == found)


def _compile_soon(graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Any:
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.lowering import lowerings, make_fallback

    for norm in _norms():
        if (
            norm not in lowerings
        ):  # by itself inductor does this too, unless $CI is set, where it wants a decomposition
            make_fallback(norm, warn=False, override_decomp=True)
    return compile_fx(graph, inputs, decompositions=WithoutNorms())


def _norms() -> tuple[torch._ops.OpOverload, ...]:
    return torch.ops.aten.native_group_norm.default, torch.ops.aten.native_layer_norm.default


class WithoutNorms(dict[Any, Callable[..., Any]]):
    """Inductor's decompositions of operators, but for the norms."""

    def __init__(self) -> None:
        from torch._inductor.decomposition import select_decomp_table

        super().__init__((op, rule) for op, rule in select_decomp_table().items() if op not in _norms())

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Inductor's cache pickles them for its key, and cannot pickle every rule."""
        return WithoutNorms, ()


def _graphs_found() -> int:
    """How many graphs of this process came from inductor's caches on disk."""
    from torch._dynamo.utils import counters

    return counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """Collecting garbage takes a tenth of the time of a compilation, which makes millions of objects that stay."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@functools.cache  # once a process
def _ready_compiler() -> None:
    """While dynamo traces, which takes one core, let inductor try the compiler and compile its headers.

    These then lie in its cache, where the compilation proper looks for them.
    """
    # All that both threads use is imported here: two that import what imports each other may see it half made.
    importlib.import_module("torch._inductor.compile_fx")
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    def compile_nothing() -> None:
        with suppress(Exception):  # what is wrong with the compiler is said by the compilation that needs it
            CppPythonBindingsCodeCache.load_pybinding(["float*"], 'extern "C" void kernel(float* nothing) {}')

    # No daemon: a header that the end of the process leaves half written would fail every compilation after it.
    threading.Thread(target=compile_nothing, name="ready-compiler").start()
