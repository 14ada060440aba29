"""The blocks of a model as graphs, of which equal blocks share one: weights are arguments of a graph.

For streamed models, whose blocks lie in another buffer at each call: a graph with weights as constants would hold them
on the device, for which there is no room. And for models with a step cache, which leaves blocks out.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial, update_wrapper
from typing import Any, cast

import torch
from torch import nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ascend.graphs.key import ambient, describe, kind_of
from ascend.graphs.static import MOST_GRAPHS, Backend, Call, Graph, bind, restore
from ascend.graphs.watch import INTERNALS, Watch, is_plain_object

logger = logging.getLogger(__name__)

HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Block:
    """One block, what it is like, its own forward, and what takes the place of that."""

    graphs: Any

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module, self.device = module, device
        self.forward = module.forward
        self.has_own_forward = "forward" in vars(module)
        self.look()

    def look(self) -> None:
        self.skeleton = make_skeleton(self.module)
        self.kind = describe(self.skeleton, self.device)
        self.watch = Watch(self.module)

    def weights(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers by their names, as they lie now: no nn.Parameter, which torchair makes constant."""
        tensors = (*self.module.named_parameters(remove_duplicate=False), *self.module.named_buffers())
        return {name: tensor.data for name, tensor in tensors}


class BlockGraphs:
    """Takes the place of the forwards of `modules`, for inference; `remove` puts them back.

    A kind of block is all that a graph depends on but the values of its weights. A block that cannot be compiled is
    computed in eager mode, and a warning says so.

    Attributes:
        graphs: for each kind of block those of its kinds of calls, None where a call runs in eager mode.
        eager: why, by the name of the block's class.
    """

    def __init__(self, modules: list[nn.Module], device: torch.device, backend: Backend, name: str) -> None:
        self.backend, self.name, self.device = backend, name, device
        self.graphs: dict[str, OrderedDict[Any, Graph | None]] = {}
        self.eager: dict[str, str] = {}
        self.blocks = [Block(module, device) for module in modules]
        for block in self.blocks:
            block.graphs = update_wrapper(partial(self._call, block), block.forward)
            cast(Any, block.module).forward = block.graphs

    def __str__(self) -> str:
        kinds = len({block.kind for block in self.blocks})
        return f"{self.backend.name}, one graph for each of {kinds} kind{'s' * (kinds > 1)} of block"

    def remove(self) -> None:
        """Raises RuntimeError where something has been put around a block since, and would get lost."""
        if any(vars(block.module).get("forward") is not block.graphs for block in self.blocks):
            raise RuntimeError(f"the blocks of {self.name} were wrapped after they were compiled: undo that first")
        for block in self.blocks:
            if block.has_own_forward:
                cast(Any, block.module).forward = block.forward
            else:
                del block.module.forward
        self.graphs.clear()

    def _call(self, block: Block, *args: Any, **kwargs: Any) -> Any:
        if block.watch.has_other_parts():
            before = block.kind
            block.look()
            if block.kind != before and block.kind not in self.graphs:
                logger.warning("a block of %s has changed since it was compiled: its graph is made anew", self.name)
        leaves, structure = pytree.tree_flatten(((block.weights(), args, kwargs), {}))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise RuntimeError(f"{self.name} is compiled for inference and gives no gradients: decompile it first")
        try:
            key = structure, tuple(map(kind_of, leaves)), ambient(self.device.type)
        except TypeError as error:  # an argument that a graph cannot depend on
            self._report(block, error)
            return block.forward(*args, **kwargs)
        graphs = self.graphs.setdefault(block.kind, OrderedDict())
        with torch.no_grad():
            if key not in graphs:
                return self._make(block, graphs, key, leaves, tensors)
            graphs.move_to_end(key)
            graph = graphs[key]
            return block.forward(*args, **kwargs) if graph is None else restore(*graph(*tensors))

    def _make(self, block: Block, graphs: OrderedDict[Any, Graph | None], key: Any, leaves: Any, tensors: Any) -> Any:
        digest = hashlib.sha256(repr((block.kind, key)).encode()).hexdigest()[:32]
        call = Call(block.skeleton, partial(functional_call, block.skeleton), key[0], leaves)
        results: Any = None
        try:
            require_no_strays(block.skeleton)
            made = self.backend.make(bind(call, digest), digest, tensors)
            graphs[key], results = made.graph, restore(*made.results)
        except Exception as error:  # of compilers of all kinds
            self._report(block, error)
            graphs[key] = None
            _, args, kwargs = pytree.tree_unflatten(leaves, key[0])[0]
            results = block.forward(*args, **kwargs)
        if len(graphs) > MOST_GRAPHS:
            graphs.popitem(last=False)
        return results

    def _report(self, block: Block, error: Exception) -> None:
        kind = type(block.module).__name__
        if kind not in self.eager:
            self.eager[kind] = f"{error}".strip().partition("\n")[0]
            logger.warning("%s: %s is not compiled and runs in eager mode: %s", self.name, kind, self.eager[kind])


def make_skeleton(module: nn.Module, is_block: bool = True) -> nn.Module:
    """A copy of `module` without values, to be traced with other weights: its attributes are those of `module`.

    Hooks of the block itself are left out, as they are called around its graph.
    """
    skeleton = object.__new__(type(module))
    attributes = {name: value for name, value in vars(module).items() if not (is_block and name == "forward")}
    for name in ("_parameters", "_buffers"):
        attributes[name] = {key: _without_values(tensor) for key, tensor in attributes[name].items()}
    attributes["_modules"] = {
        name: child and make_skeleton(child, is_block=False) for name, child in module.named_children()
    }
    if is_block:
        attributes |= {name: OrderedDict() for name in HOOKS}
    vars(skeleton).update(attributes)
    return skeleton


def _without_values(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None:
        return None
    bare = torch.empty_like(tensor, device="meta")
    return nn.Parameter(bare, requires_grad=False) if isinstance(tensor, nn.Parameter) else bare


def require_no_strays(module: nn.Module) -> None:
    """A tensor that is no buffer would be a constant of the graph, whose blocks may each have another.

    Raises:
        ValueError: there is one, or a module that is no submodule.
    """
    for name, part in module.named_modules():
        for attribute, value in vars(part).items():
            if attribute not in INTERNALS and any(
                isinstance(held, torch.Tensor | nn.Module) for held in _held_by(value, 3)
            ):
                path = f"{name}.{attribute}".lstrip(".")
                raise ValueError(f"{path} holds tensors that are neither parameters nor buffers of the block")


def _held_by(value: Any, depth: int) -> Iterator[Any]:
    yield value
    if depth == 0:
        return
    contents: Any = ()
    if isinstance(value, dict):
        contents = value.values()
    elif isinstance(value, list | tuple | set):
        contents = value
    elif is_plain_object(value):
        contents = vars(value).values()
    for held in contents:
        yield from _held_by(held, depth - 1)
