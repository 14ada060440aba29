"""Notices that a module is no longer what its graphs were made from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain
from operator import attrgetter, itemgetter
from types import ModuleType
from typing import Any

import torch
from torch import nn

DEPTH = 3  # of the objects and containers that a module holds: a config's lists, a processor's settings
STANDARD = frozenset(vars(nn.Module())) - {"training"}  # the attributes of every module
# Attributes whose own contents are watched as DICTIONARIES, in the module that they are of, or are around a graph and
# no part of it.
INTERNALS = frozenset({*vars(nn.Module()), "forward", "_shared_batch", "_parameters_of_stack", "_diffusers_hook"})
# The dictionaries of every module that others write to; that one was empty does not keep it so.
DICTIONARIES = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")


class Watch:
    """The state of a module and all that belongs to it, to be compared at each of its calls.

    That is: which submodules, parameters, attributes and hooks there are and of which classes; the attributes of the
    objects that modules hold, such as attention processors and configurations; where each parameter lies and how often
    it was written to. All of it is compared by identity, which may report a change where a value was replaced by an
    equal one. Half a millisecond for a UNet; no tensor is read.

    Writing to `parameter.data` goes unseen, as torch does not count it.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        # Inference counts no writes, and a weight that is locked while it is with the host lies nowhere.
        self._tensors = [
            tensor for tensor in _tensors_of(module) if not tensor.is_inference() and torch._C._has_storage(tensor)
        ]
        self._addresses = self._address_all()
        self._objects: list[Any] = []
        self._containers: list[Collection[Any]] = []
        self._dictionaries = [vars(child)[name] for child in modules for name in DICTIONARIES]
        self._attributes = [_own_attributes(child) for child in modules]
        seen: set[int] = set()
        for child in modules:
            self._add(child, seen, DEPTH)
        self._containers += [dictionary.values() for dictionary in self._dictionaries if dictionary]
        self._dictionaries += map(vars, modules)
        self._lengths = self._measure()
        self._elements = list(self._read())  # held, so that no id is used again
        self._ids = list(map(id, self._elements))
        self._classes = list(map(type, self._objects))

    def has_changed(self) -> bool:
        """Whether anything is different from what it was when this was made."""
        return self.has_other_parts() or self.has_other_tensors()

    def has_other_parts(self) -> bool:
        """Whether anything is but what is in the tensors, and where they lie."""
        try:
            return (
                self._measure() != self._lengths
                or list(map(type, self._objects)) != self._classes
                or list(map(id, self._read())) != self._ids
            )
        except KeyError:  # an attribute has gone
            return True

    def has_other_tensors(self) -> bool:
        """Whether a parameter or buffer was written to or lies elsewhere: the least part of it all."""
        return self._address_all() != self._addresses

    def has_same_tensors(self, other: Watch) -> bool:
        """Whether both found the same parameters and buffers, at the same places and with the same values."""
        return self._addresses == other._addresses and list(map(id, self._tensors)) == list(map(id, other._tensors))

    def _measure(self) -> list[int]:
        return list(map(len, chain(self._dictionaries, self._containers)))

    def _read(self) -> Iterator[Any]:
        """All attributes and elements as they are now."""
        attributes = [select(dictionary) for select, dictionary in self._attributes]
        return chain(chain.from_iterable(attributes), chain.from_iterable(self._containers))

    def _address_all(self) -> tuple[list[int], list[int]]:
        return list(map(torch.Tensor.data_ptr, self._tensors)), list(map(attrgetter("_version"), self._tensors))

    def _add(self, holder: object, seen: set[int], depth: int) -> None:
        """Watch an object's class and attributes, and what these hold."""
        seen.add(id(holder))
        self._objects.append(holder)
        if not isinstance(holder, nn.Module):
            self._containers.append(vars(holder).values())
        self._add_contents((value for name, value in vars(holder).items() if name not in INTERNALS), seen, depth)

    def _add_contents(self, elements: Iterable[Any], seen: set[int], depth: int) -> None:
        if depth == 0:
            return
        for element in elements:
            if id(element) in seen:
                continue
            if isinstance(element, dict | list | set):
                seen.add(id(element))
                container = element.values() if isinstance(element, dict) else element
                self._containers.append(container)
                self._add_contents(container, seen, depth - 1)
            elif is_plain_object(element):
                self._add(element, seen, depth - 1)


def is_plain_object(value: object) -> bool:
    """Whether `value` is an object that modules hold for its attributes, as processors and configurations are."""
    is_code = isinstance(value, type | ModuleType) or (callable(value) and hasattr(value, "__code__"))
    return hasattr(value, "__dict__") and not is_code and not isinstance(value, nn.Module | torch.Tensor)


def _tensors_of(module: nn.Module) -> Iterator[torch.Tensor]:
    return chain(module.parameters(), module.buffers())


def _own_attributes(module: nn.Module) -> tuple[Callable[[dict[str, Any]], tuple[Any, ...]], dict[str, Any]]:
    """A module's dictionary, and a function that reads from it what may change."""
    names = [name for name in vars(module) if name not in STANDARD]
    return itemgetter("training", *DICTIONARIES, *names), vars(module)
