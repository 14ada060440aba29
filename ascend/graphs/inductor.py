"""Graphs for CPUs and CUDA GPUs: torch's inductor."""

from __future__ import annotations

import shutil
import types
from contextlib import ExitStack

import torch
from torch import nn

from ascend.graphs.static import Made


class Inductor:
    """Compiles with frozen weights: packed once into the layouts of the matrix kernels, not in every call.

    Whether weights are frozen is read from a setting of the process, while dynamo traces and inductor compiles; an
    option of `torch.compile` reaches the latter alone and then freezes nothing.

    Raises:
        RuntimeError: there is no C++ compiler.
    """

    name = "inductor"

    def __init__(self, device: torch.device) -> None:
        if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
            raise RuntimeError("compiling for the CPU needs a C++ compiler: neither g++ nor clang++ is on the PATH")

    def prepare(self, module: nn.Module, undo: ExitStack) -> None:
        """Nothing to do: freezing brings the weights of each graph into its layouts."""

    def make(self, call: types.MethodType, digest: str, tensors: list[torch.Tensor]) -> Made:
        graph = torch.compile(call, backend="inductor", fullgraph=True, dynamic=False)
        with torch._inductor.config.patch(freezing=True):
            return Made(graph, graph(*tensors), is_new=True)
