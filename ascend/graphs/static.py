"""The forward of a module as static graphs, one for each kind of call.

A compiler's own answer to a call of another kind is to guard and compile again, up to a limit (torch.compile), or not
to look at all (torchair's `cache_compile`). Here each kind of call has a graph of its own, made from the module as it
is when it is first called so; when the module changes, its graphs go.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import logging
import time
import types
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ascend.graphs.key import ambient, describe, kind_of
from ascend.graphs.watch import Watch

logger = logging.getLogger(__name__)

MOST_GRAPHS = 16  # of a module: more kinds of calls take turns
MOST_SETTINGS = 2  # whose graphs are kept: what is switched off for a while, as an adapter, will be on again

_made = itertools.count(1)  # the graphs of this process

Graph = Callable[..., Any]
Prepare = Callable[[nn.Module, ExitStack], None]


class Made(NamedTuple):
    graph: Graph
    results: Any  # of the first call
    is_new: bool  # not found on disk


class Backend(Protocol):
    """What makes graphs.

    Attributes:
        prepare_blocks: as `prepare`, of what becomes graphs that take weights as arguments; None: nothing to prepare.
    """

    name: str

    @property
    def prepare_blocks(self) -> Prepare | None: ...

    def prepare(self, module: nn.Module, undo: ExitStack) -> None:
        """Bring `module`, which becomes one graph, into the form that this reads, and register how to put it back."""

    def make(self, call: types.MethodType, digest: str, tensors: list[torch.Tensor]) -> Made:
        """The graph of `call`, a method of a `Call`, and what it gives for `tensors`.

        `digest` is of all that the graph depends on.
        """


class StaticGraphs:
    """Takes the place of a module's forward and calls it as static graphs, for inference.

    Args:
        module: to be compiled; it keeps this as its `forward` until `remove`.
        backend: makes the graphs.
        name: of the module, for messages.
    """

    def __init__(self, module: nn.Module, backend: Backend, name: str) -> None:
        self.module = module
        self.backend = backend
        self.name = name
        self.compilations = 0  # graphs that were not found on disk
        self._device = next(module.parameters()).device
        self._forward = module.forward
        self._own_forward = vars(module).get("forward")
        self._undo = ExitStack()
        self.graphs: OrderedDict[Any, Graph] = OrderedDict()
        self._graphs_of: OrderedDict[str, OrderedDict[Any, Graph]] = OrderedDict()  # with other settings, by these
        from diffusers.models.unets.change_watch import current_loop  # of the fork, whose absence runners report

        self._current_loop = current_loop
        self._description = ""  # of the module that `graphs` were made from
        self._loop: object | None = None  # in whose first step the whole module was compared
        self._prepare()
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        loop = self._current_loop()
        is_known = loop is not None and loop is self._loop
        if self._watch.has_other_tensors() if is_known else self._watch.has_changed():
            self._look_again()
        self._loop = loop
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise RuntimeError(f"{self.name} is compiled for inference and gives no gradients: decompile it first")
        key = structure, tuple(map(kind_of, leaves)), ambient(self._device.type)
        with torch.no_grad():
            graph = self.graphs.get(key)
            if graph is None:
                return self._make(key, leaves, tensors)
            self.graphs.move_to_end(key)
            return restore(*graph(*tensors))

    def remove(self) -> None:
        """Put the module back as it was before it was compiled.

        Raises:
            RuntimeError: something else has been put around the compiled forward, and would get lost.
        """
        if vars(self.module).get("forward") is not self:
            raise RuntimeError(f"{self.name} was wrapped after it was compiled (offload hooks?): undo that first")
        if self._own_forward is None:
            del self.module.forward
        else:
            self.module.forward = self._own_forward
        self._forget()
        self._undo.close()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(f"{self.name} is compiled, and graphs cannot be copied or pickled: decompile it first")

    def _prepare(self) -> None:
        parameters = list(self.module.parameters())
        for parameter in parameters:
            self._undo.callback(parameter.requires_grad_, parameter.requires_grad)
        self.module.requires_grad_(False)
        try:
            self.backend.prepare(self.module, self._undo)
            self._watch = Watch(self.module)
        except BaseException:
            self._undo.close()
            raise

    def _look_again(self) -> None:
        """Drop the graphs, or lay them aside, if the module is no longer what they were made from."""
        if has_step_cache(self.module):
            raise RuntimeError(
                f"{self.name} has a step cache since it was compiled as a whole, and a graph cannot leave blocks out: "
                "decompile_module(model), then compile_module(model, by_block=True) before the cache is enabled"
            )
        if any(is_moved_by_hooks(child) for child in self.module.modules()):
            raise RuntimeError(
                f"{self.name} is offloaded since it was compiled, and graphs want its weights to stay where they are: "
                "compile without offloading, or decompile_pipeline(pipe) before it"
            )
        if any(parameter.device != self._device for parameter in self.module.parameters()):
            raise RuntimeError(
                f"{self.name} left {self._device}, where it was compiled: decompile_pipeline(pipe), move it, then "
                "compile it again"
            )
        if self.graphs:
            watch, description = Watch(self.module), describe(self.module)
            is_same = watch.has_same_tensors(self._watch)
            if not is_same or description not in (self._description, *self._graphs_of):
                logger.warning("%s has changed since it was compiled: its graphs are made anew", self.name)
            if is_same:
                self._watch = watch
                self._turn_to(description)
                return
        self._forget()
        self._undo.close()
        self._prepare()

    def _turn_to(self, description: str) -> None:
        """To the graphs that were made with these settings, if any; weights are what they were."""
        self.module.requires_grad_(False)  # which peft may have switched on
        if description != self._description:
            self._graphs_of[self._description] = self.graphs
            self.graphs = self._graphs_of.pop(description, OrderedDict())
            self._description = description
            while len(self._graphs_of) >= MOST_SETTINGS:
                self._graphs_of.popitem(last=False)

    def _forget(self) -> None:
        self.graphs.clear()
        self._graphs_of.clear()

    def _make(self, key: Any, leaves: list[Any], tensors: list[torch.Tensor]) -> Any:
        if not self.graphs:
            self._watch = Watch(self.module)
            self._description = describe(self.module)
        digest = hashlib.sha256(repr((self._description, key)).encode()).hexdigest()[:32]
        call = Call(self.module, self._forward, key[0], leaves)
        number = len(self.graphs) + 1
        logger.info("compiling %s, graph %d ...", self.name, number)
        start = time.perf_counter()
        try:
            made = self.backend.make(bind(call, digest), digest, tensors)
        except BaseException:
            if not self.graphs and vars(self.module).get("forward") is self:
                self.remove()
            raise
        how = "compiled" if made.is_new else "found on disk"
        logger.info("... %s in %.1f s", how, time.perf_counter() - start)
        self.compilations += made.is_new
        self.graphs[key] = made.graph
        if len(self.graphs) > MOST_GRAPHS:
            self.graphs.popitem(last=False)
        return restore(*made.results)


def is_moved_by_hooks(module: nn.Module) -> bool:
    """Whether hooks of accelerate or diffusers bring the weights when they are needed, so that they do not stay."""
    return hasattr(module, "_hf_hook") or has_hooks_of_diffusers(module)


def has_step_cache(module: nn.Module) -> bool:
    """Whether diffusers' cache hooks decide in each step which blocks of a model are computed."""
    return bool(getattr(module, "is_cache_enabled", False))


def has_hooks_of_diffusers(module: nn.Module) -> bool:
    """Whether it has any now: what has had some keeps a registry without."""
    registry: Any = getattr(module, "_diffusers_hook", None)
    return registry is not None and bool(registry.hooks)


@dataclass(frozen=True)
class Slot:
    """The place of a tensor among arguments."""

    index: int


def has_plain_nodes(arguments: Any) -> bool:
    """Whether all that arguments are nested in is a tuple, list or dictionary."""
    if type(arguments) in (tuple, list, dict):
        values = arguments.values() if type(arguments) is dict else arguments
        return all(map(has_plain_nodes, values))
    return type(arguments) not in pytree.SUPPORTED_NODES and not pytree.is_namedtuple_instance(arguments)


def fill(arguments: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """`arguments` of plain nodes, with tensors in their slots."""
    if isinstance(arguments, Slot):
        return tensors[arguments.index]
    if isinstance(arguments, (tuple, list)):
        return type(arguments)([fill(value, tensors) for value in arguments])
    if isinstance(arguments, dict):
        return {name: fill(value, tensors) for name, value in arguments.items()}
    return arguments


class Call(nn.Module):
    """One kind of call of a module: its tensors are the arguments, all else is constant."""

    def __init__(self, module: nn.Module, forward: Graph, structure: pytree.TreeSpec, leaves: list[Any]) -> None:
        super().__init__()
        self.module = module
        self.call = forward
        tensors = itertools.count()
        slots = [Slot(next(tensors)) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.arguments = pytree.tree_unflatten(slots, structure)
        self.is_plain = has_plain_nodes(self.arguments)

    def forward(self, *tensors: torch.Tensor) -> tuple[Any, tuple[str, ...], str, str]:
        """The results, and for those of a class with named fields these names and the class, as cached code cannot
        name a class itself."""
        # A graph that calls pytree is made anew when one more class is registered there, as diffusers does for each
        # module that it imports late, a scheduler's for example.
        if self.is_plain:
            args, kwargs = fill(self.arguments, tensors)
        else:
            args, kwargs = pytree.tree_map_only(Slot, lambda slot: tensors[slot.index], self.arguments)
        results = self.call(*args, **kwargs)
        if isinstance(results, dict):  # as the outputs of diffusers and transformers are
            return tuple(results.values()), tuple(results.keys()), type(results).__module__, type(results).__name__
        return results, (), "", ""


def bind(call: Call, digest: str) -> types.MethodType:
    """`call.forward` with a code of its own.

    dynamo and torchair tell compiled methods apart by their code, which all instances of a class share: torchair by
    the name, where graphs are kept, and within a process by the code's value. A constant makes that another.
    """
    own = Call.forward.__code__
    code = own.replace(co_name=f"forward_{digest}", co_consts=(*own.co_consts, next(_made)))
    return types.MethodType(types.FunctionType(code, globals()), call)


def restore(values: Any, fields: tuple[str, ...], module: str, name: str) -> Any:
    """What the module returned, from what `Call.forward` made of it."""
    if not fields:
        return values
    return getattr(importlib.import_module(module), name)(**dict(zip(fields, values, strict=True)))
