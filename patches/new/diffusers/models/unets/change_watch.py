# Copyright 2026 The diffusers-npu authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Notices what a callback changes between two denoising steps, so that nothing computed before is reused after.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn


_PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device))
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))

_loop: ContextVar[object | None] = ContextVar("denoising_loop", default=None)


@contextmanager
def denoising_loop(model: nn.Module, has_callbacks: bool) -> Iterator[None]:
    """
    Surrounds the steps of a pipeline that calls `model`; `current_loop` gives it a name of its own if neither callbacks
    nor hooks run in between.
    """
    is_alone = not has_callbacks and not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    token = _loop.set(object() if is_alone else None)
    try:
        yield
    finally:
        _loop.reset(token)


def current_loop() -> object | None:
    """
    The denoising loop that this is called from, unless callbacks or hooks may change the model between its steps. Who
    has compared the structure and settings of a model in one step of a loop need not do so in the next. A scheduler
    that changes the model is not foreseen.
    """
    return _loop.get()


class ChangeWatch:
    """
    Compares a model, and the inputs that it gets in every step, with what they were at the last look.

    It sees parameters that are replaced or written to; modules, hooks and attention processors that are put in or
    replaced; and the settings (numbers, strings and containers of them) of processors and of all modules but torch's
    own layers: scales of adapters, merged adapters, FreeU. No tensor is read, so that no device is waited for, and a
    UNet of 700 modules takes one or two milliseconds. What is written through `parameter.data` or into inference tensors
    is not seen, since torch keeps no count of it.
    """

    def __init__(self) -> None:
        self._model: nn.Module | None = None

    def look(self, model: nn.Module, *inputs: Any) -> bool:
        """Whether anything is other than at the last look; true for the first one."""
        if model is self._model and self._facts(inputs) == self._last_facts:
            return False
        self._survey(model, inputs)
        return True

    def _survey(self, model: nn.Module, inputs: tuple) -> None:
        self._model = model
        self._modules = list(model.modules())
        self._states = [vars(module) for module in self._modules]
        self._settings = []
        for module, state in zip(self._modules, self._states):
            is_layer = type(module).__module__.startswith("torch.nn.")
            names = {"forward"} if is_layer else state.keys() - _OF_EVERY_MODULE
            self._settings += [(state, name) for name in names & state.keys()]
        processors = [state["processor"] for state in self._states if state.get("processor") is not None]
        self._settings += [(vars(processor), name) for processor in processors for name in vars(processor)]
        self._last_facts = self._facts(inputs)
        # Kept, since an object that comes later may have the identity of one that is gone.
        self._kept = self._members(), [state[name] for state, name in self._settings], inputs

    def _members(self) -> list[Any]:
        tables = ("_parameters", "_buffers", "_modules", "_forward_pre_hooks", "_forward_hooks")
        return [item for state in self._states for name in tables if state[name] for item in state[name].values()]

    def _facts(self, inputs: tuple) -> list[Any]:
        members = self._members()
        tensors = [member for member in members if isinstance(member, torch.Tensor)]
        settings = [state.get(name) for state, name in self._settings]
        return [
            [type(module) for module in self._modules],
            [len(state) for state in self._states],
            [id(member) for member in members],
            [_tensor_facts(tensor) for tensor in tensors],
            [value if type(value) in _PLAIN else _facts_of(value) for value in settings],
            _facts_of(inputs),
        ]


def _facts_of(value: Any) -> Any:
    if type(value) in _PLAIN:
        return value
    if isinstance(value, torch.Tensor):
        return id(value), _tensor_facts(value)
    if isinstance(value, dict):
        return [(key, _facts_of(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [_facts_of(item) for item in value]
    return id(value)


def _tensor_facts(tensor: torch.Tensor) -> tuple[int | None, int | None]:
    """What changes when `tensor` is written to, and when its `data` is set."""
    version = None if tensor.is_inference() else tensor._version
    return version, tensor.data_ptr() if type(tensor) in (torch.Tensor, nn.Parameter) else None
