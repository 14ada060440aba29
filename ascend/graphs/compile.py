"""Graph compilation of a pipeline or a model, and its inverse: torchair on NPU, inductor elsewhere."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ascend.graphs.blocks import BlockGraphs
from ascend.graphs.inductor import Inductor
from ascend.graphs.static import Backend, StaticGraphs, has_step_cache, is_moved_by_hooks
from ascend.graphs.store import GraphStore, default_graph_cache
from ascend.pipelines import Parts, models_at, owner_of, parts_of
from ascend.streaming import Stream, find_blocks

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

RESIDENT = "_block_graphs"  # of a module that is not streamed: these and how to put its weights back


def compile_pipeline(
    pipe: DiffusionPipeline,
    graph_cache: Path | None = None,
    graph_cache_limit: int | None = None,
    by_block: bool = False,
) -> dict[str, str]:
    """Compile in place what runs in every step, and on an NPU what runs once a picture, as graphs without a break.

    Which that is says the pipeline's row in `ascend.pipelines`: the UNet and a ControlNet; text encoders and the VAE's
    encoder and decoder, for which inductor would compile for longer than they save in hundreds of pictures. Graphs
    are made when a component is first called in a new way, from what it is then. The UNet becomes one graph
    for each kind of call: with DeepCache a full and a shallow one, and as many for another batch or picture size; a
    ControlNet one for each scale, which is a constant of it.
    Weights are constants of a graph, in the layout that the matrix kernels read. A component that changes afterwards
    (attention processors, token merging, adapters, weights) gets new graphs at its next call. What is compiled
    already stays so.

    A streamed component keeps its weights with the host: its blocks become graphs that take weights as arguments, and
    equal blocks share one. On an NPU the weights lie with the host in the layout that the matrix kernels read, where
    nobody else can read or change them until the component is decompiled; weights that come from files stay in
    torch's own.

    Args:
        pipe: a pipeline whose components are where they are to run.
        graph_cache: where an NPU's graphs are kept for other processes; by default in the user's cache directory.
        graph_cache_limit: bytes that they may take there, 8 GiB if None; those that were not used longest go.
        by_block: make graphs of the blocks of what runs in every step, as of those of streamed ones; a step cache
            wants that, which is enabled afterwards.

    Returns:
        The components' names and how each runs: `"torchair"`, `"inductor"`, in blocks with the number of its
        kinds of block, as `"torchair, one graph for each of 5 kinds of block"`, or `"eager"` where compiling would not
        pay, hooks offload it, it is on another device than the UNet, or the pipeline casts it in each call (the VAE of
        SDXL in float16), so that its parameters are no constants.

    Raises:
        ValueError: the pipeline has no row; `compile_module` compiles a model alone.
        RuntimeError: a backend lacks what it needs, such as a C++ compiler, or the forward of a component was
            replaced, as `share_guidance` does. The pipeline is then as it was before.
    """
    parts = parts_of(pipe)
    device = device_of(getattr(pipe, parts.each_step[0]))
    done = {}
    with ExitStack() as undo:
        for name, module in models_at(pipe, parts.each_picture + parts.each_step):
            if not is_compiled(module):
                reason = None if _stream_of(module) else _why_eager(pipe, parts, name, device)
                if reason:
                    logger.warning("%s is not compiled: %s", name, reason)
                if reason or (device.type != "npu" and name in parts.each_picture):
                    done[name] = "eager"
                    continue
                undo.callback(decompile_module, module)
            in_blocks = by_block and name in parts.each_step
            done[name] = compile_module(module, graph_cache, graph_cache_limit, name, in_blocks)
        undo.pop_all()
    return done


def decompile_pipeline(pipe: DiffusionPipeline) -> None:
    """Undo `compile_pipeline`; does nothing where it was not called.

    Raises:
        RuntimeError: the forward of a component has been wrapped since, by offload hooks or `share_guidance`.
    """
    parts = parts_of(pipe)
    for _, module in models_at(pipe, parts.each_picture + parts.each_step):
        decompile_module(module)


def compile_module(
    module: nn.Module,
    graph_cache: Path | None = None,
    graph_cache_limit: int | None = None,
    name: str | None = None,
    by_block: bool = False,
) -> str:
    """Compile one module in place (see `compile_pipeline`) and return the name of the backend, of a streamed module
    and `by_block` with the number of its kinds of block. `stop_streaming` ends that, too.

    Raises:
        RuntimeError: the backend lacks what it needs, the module's forward was replaced, it has a step cache, or is
            compiled as a whole and not by block.
        ValueError: it is not known which blocks a module has.
    """
    name = name or type(module).__name__
    if has_step_cache(module):
        raise RuntimeError(
            f"{name} has a step cache: disable it, compile the model with by_block=True, then enable the cache again"
        )
    graphs = _find_graphs(module)
    if graphs is not None:
        if by_block:
            raise RuntimeError(f"{name} is compiled as a whole: decompile it before it is compiled by block")
        return graphs.backend.name
    stream = _stream_of(module)
    if stream is not None:
        blocks = _find_block_graphs(module)
        if blocks is None:
            backend = make_backend(stream.execution_device, graph_cache, graph_cache_limit)
            if backend.prepare_blocks is not None:
                stream.prepare(backend.prepare_blocks)
            blocks = BlockGraphs(stream.blocks, stream.execution_device, backend, name)
            stream.handles.append(blocks)
        return str(blocks)
    if by_block:
        found = _find_block_graphs(module)
        if found is None:
            found = _compile_blocks(module, make_backend(device_of(module), graph_cache, graph_cache_limit), name)
        return str(found)
    if is_compiled(module):
        raise RuntimeError(f"{name} is compiled by block: decompile it before it is compiled as a whole")
    forward = vars(module).get("forward")
    if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        raise RuntimeError(f"{name} cannot be compiled after its forward was replaced by {forward!r:.100}")
    backend = make_backend(next(module.parameters()).device, graph_cache, graph_cache_limit)
    StaticGraphs(module, backend, name)
    return backend.name


def is_compiled(module: nn.Module) -> bool:
    """Whether `compile_module` is in effect."""
    return _find_graphs(module) is not None or _find_block_graphs(module) is not None


def is_one_graph(module: nn.Module) -> bool:
    """Whether `compile_module` is in effect for the module as a whole, and not by block."""
    return _find_graphs(module) is not None


def decompile_module(module: nn.Module) -> None:
    """Undo `compile_module`; does nothing where it was not called.

    Raises:
        RuntimeError: the module's forward has been wrapped since, or its blocks', as by a step cache.
    """
    graphs = _find_graphs(module)
    if graphs is not None:
        graphs.remove()
    blocks, stream = _find_block_graphs(module), _stream_of(module)
    if blocks is not None:
        blocks.remove()
        if stream is not None:
            stream.handles.remove(blocks)
        else:
            vars(module).pop(RESIDENT)[1].close()
    if stream is not None:
        stream.prepare(None)


def _why_eager(pipe: DiffusionPipeline, parts: Parts, path: str, device: torch.device) -> str | None:
    """Why the parameters of the model at `path` are no constants, if they are not."""
    owner: nn.Module = getattr(pipe, owner_of(path))  # its hooks move its parts, too
    parameter = next(owner.parameters())
    if any(map(is_moved_by_hooks, owner.modules())) or parameter.device != device:
        return f"it is offloaded, or not on {device}"
    if owner_of(path) == "vae" and parameter.dtype in parts.casts_vae and pipe.vae.config.force_upcast:
        return "the pipeline casts it to float32 and back in each call"
    return None


def _find_graphs(module: nn.Module) -> StaticGraphs | None:
    """The module's graphs, also beneath what wrapped its forward later."""
    forward = vars(module).get("forward")
    while forward is not None and not isinstance(forward, StaticGraphs):
        forward = getattr(forward, "__wrapped__", None) or getattr(forward, "forward", None)
    return forward


def _stream_of(module: nn.Module) -> Stream | None:
    hook = getattr(module, "_hf_hook", None)
    return hook if isinstance(hook, Stream) else None


def _find_block_graphs(module: nn.Module) -> BlockGraphs | None:
    stream = _stream_of(module)
    handles = stream.handles if stream else vars(module).get(RESIDENT, ())
    return next((handle for handle in handles if isinstance(handle, BlockGraphs)), None)


def _compile_blocks(module: nn.Module, backend: Backend, name: str) -> BlockGraphs:
    """Of a module whose weights stay on the device. Its blocks are those that it says must not be split."""
    kinds = set(getattr(module, "_no_split_modules", None) or ())
    blocks = [
        block for block in find_blocks(module).values() if kinds & {type(part).__name__ for part in block.modules()}
    ]
    if not blocks:
        raise ValueError(f"{name} is a {type(module).__name__}, of which no list of blocks is known: compile it whole")
    with ExitStack() as undo:
        if backend.prepare_blocks is not None:
            backend.prepare_blocks(module, undo)
        graphs = BlockGraphs(blocks, device_of(module), backend, name)
        vars(module)[RESIDENT] = graphs, undo.pop_all()
    return graphs


def device_of(module: nn.Module) -> torch.device:
    """Where `module` computes."""
    stream = _stream_of(module)
    return stream.execution_device if stream else next(module.parameters()).device


def make_backend(device: torch.device, graph_cache: Path | None, graph_cache_limit: int | None) -> Backend:
    if device.type != "npu":
        return Inductor(device)
    from ascend.graphs.torchair import Torchair

    return Torchair(GraphStore(graph_cache or default_graph_cache(), graph_cache_limit))
