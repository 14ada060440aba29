"""Graphs for Ascend NPUs: torchair, with weights in the chip's own layouts and graphs on disk."""

from __future__ import annotations

import logging
import shutil
import types
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch._functorch.compile_utils import fx_graph_cse

from ascend.graphs.converters import register_converters
from ascend.graphs.fusions import fuse
from ascend.graphs.key import platform
from ascend.graphs.rows import compute_equal_rows_once
from ascend.graphs.static import Call, Made
from ascend.graphs.store import GraphStore
from ascend.graphs.time_projections import share_time_projections

logger = logging.getLogger(__name__)

FRACTAL_Z = 4
COMPILED = "compiled_module"  # what torchair calls the file that it reads back


class Torchair:
    """Compiles with GE. Graphs are kept in `store`; torchair reads one back without looking what it was made from.

    Raises:
        RuntimeError, ImportError: torchair does not load.
    """

    name = "torchair"

    def __init__(self, store: GraphStore) -> None:
        self.store = store
        self.config = make_config()

    def prepare(self, module: nn.Module, undo: ExitStack) -> None:
        with _PrivateFormatsAllowed():
            share_time_projections(module, undo)
        self.prepare_blocks(module, undo)

    def prepare_blocks(self, module: nn.Module, undo: ExitStack) -> None:
        """Cast weights: torchair declares an argument of a graph to GE in the format that the first call has it in."""
        undo.callback(_restore_formats, [(parameter, _format(parameter)) for parameter in module.parameters()])
        use_private_formats(module)

    def make(self, call: types.MethodType, digest: str, tensors: list[torch.Tensor]) -> Made:
        kind = type(cast(Call, call.__self__).module).__name__
        name = f"{kind}-{digest}"
        with self.store.locked(name):
            folder = self.store.find(name)
            if folder is not None:
                graph = self._open(call, folder)
                return Made(graph, graph(*tensors), is_new=False)
            about = {"module": kind, "made by": platform(tensors[0].device)}
            with self.store.make(name, about) as folder:
                graph = self._open(call, folder)
                results = graph(*tensors)
                if not any(folder.rglob(COMPILED)):
                    logger.warning("torchair cannot keep the graph of %s: every process compiles it", name)
                    shutil.rmtree(folder)
            return Made(graph, results, is_new=True)

    def _open(self, call: types.MethodType, folder: Path) -> Any:
        """What compiles `call` into `folder` at its first call, or reads the graph that is there."""
        from torchair.inference import cache_compile

        return cache_compile(call, config=self.config, dynamic=False, cache_dir=str(folder), ge_cache=True)


def make_config() -> Any:
    """torchair's compiler configuration for inference, with torchair ready to compile what this project makes."""
    import torch_npu  # noqa: F401  registers the torchair alias
    import torchair
    import torchair._contrib.custom_torch_ops  # declares the fused token merging

    register_converters()
    config = torchair.CompilerConfig()
    config.experimental_config.frozen_parameter = True
    config.post_grad_custom_pre_pass = _rewrite
    # This is what changes torch's own decompositions; cache_compile does so only after the first graph was traced.
    torchair.get_npu_backend(compiler_config=config)
    return config


def _rewrite(module: torch.fx.GraphModule, *_: Any) -> None:
    """Compute what several nodes have in common once, such as the SiLU of the time embedding in each residual block,
    which inductor does by itself and torchair does not; and launch less.
    """
    module.graph = fx_graph_cse(module.graph)
    compute_equal_rows_once(module.graph)
    fuse(module.graph)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()


def use_private_formats(module: nn.Module) -> None:
    """Cast weights into the chip's own layouts: FRACTAL_NZ of Linear, FRACTAL_Z of convolutions in 16 bits.

    torchair leaves those in bfloat16 as they are, and GE would convert them in each call by the operator that casts
    here, which takes them too (hicann/ops-math, conversion/trans_data/README.md).
    """
    import torch_npu
    from torchair.experimental.inference import use_internal_format_weight

    with _PrivateFormatsAllowed():
        use_internal_format_weight(module)
        for part in module.modules():
            if isinstance(part, nn.Conv2d) and part.groups == 1 and part.weight.dtype == torch.bfloat16:
                part.weight.data = torch_npu.npu_format_cast(part.weight.data, FRACTAL_Z)


class _PrivateFormatsAllowed:
    """Allows the chip's own layouts within the block.

    310P does so from the start; the other chips only after `allow_internal_format`, which must be set before weights
    are cast. Left on, eager convolutions would go through the old operator interface.
    """

    OPTION = "ALLOW_INTERNAL_FORMAT"

    def __enter__(self) -> None:
        import torch_npu

        before = torch_npu._C._npu_getOption(self.OPTION)  # the public setting cannot be read
        self.before = b"disable" if before is None else before
        torch_npu.npu.config.allow_internal_format = True

    def __exit__(self, *_: object) -> None:
        import torch_npu

        torch_npu.npu.config.allow_internal_format = self.before != b"disable"


def _format(tensor: torch.Tensor) -> int:
    import torch_npu

    return torch_npu.get_npu_format(tensor)


def _restore_formats(formats: list[tuple[nn.Parameter, int]]) -> None:
    import torch_npu

    with _PrivateFormatsAllowed():
        for parameter, number in formats:
            if parameter.device.type == "npu" and _format(parameter) != number:
                parameter.data = torch_npu.npu_format_cast(parameter.data, number)
