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
What the cache hooks of diffusers need of a denoising loop.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn


class StepCaches:
    """
    The states of the cache hooks on a loop's transformers, which are left without any when the loop ends.

    Transformers without hooks are left alone.
    """

    def __init__(self) -> None:
        self._cached: dict[nn.Module, bool] = {}
        self._epoch = 0

    def context(self, transformer: nn.Module, name: str, epoch: int) -> AbstractContextManager[None]:
        """
        For a step of `transformer`.

        Args:
            name: what steps it is one of; hooks keep a state for each.
            epoch: another one where a step has not the texts, sizes and models of the last one, whose state then goes.
        """
        if epoch != self._epoch:
            self.forget()
            self._epoch = epoch
        if transformer not in self._cached:
            self._cached[transformer] = _has_stateful_hooks(transformer)
            if self._cached[transformer]:
                transformer._reset_stateful_cache()  # of what ran it outside of a loop
        return transformer.cache_context(name) if self._cached[transformer] else nullcontext()

    def forget(self) -> None:
        for transformer, is_cached in self._cached.items():
            if is_cached:
                transformer._reset_stateful_cache()

    @contextmanager
    def forgotten_at_end(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.forget()


def hooks_of(module: nn.Module) -> list:
    """Of diffusers, on the module itself."""
    registry = getattr(module, "_diffusers_hook", None)
    return [] if registry is None else list(registry.hooks.values())


def _has_stateful_hooks(transformer: nn.Module) -> bool:
    has_contexts = hasattr(transformer, "cache_context")
    return has_contexts and any(hook._is_stateful for module in transformer.modules() for hook in hooks_of(module))
