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
What HiDream's transformer computes of texts and sizes, which are the same in every denoising step.
"""

import inspect
from typing import Any

import torch
from torch import nn

from ...models import HiDreamImageTransformer2DModel
from .step_caches import hooks_of


class StepArguments:
    """
    The arguments of a transformer that are the same in many steps: made once, and again when what they depend on does.

    A transformer that hooks move or watch, whose forward is another's, or which has adapters on what projects texts, gets
    the texts themselves.

    Args:
        has_callback: whether somebody may write into texts between steps, which nobody counts of inference tensors.

    Attributes:
        changes: how often they were made.
    """

    def __init__(self, has_callback: bool = False) -> None:
        self.changes = 0
        self._has_callback = has_callback
        self._made_of: tuple = ()
        self._context: tuple = ()
        self._arguments: dict[str, Any] = {}

    def __call__(
        self, transformer: HiDreamImageTransformer2DModel, embeds: tuple, latents: torch.Tensor, epoch: Any = None
    ) -> dict[str, Any]:
        """
        Args:
            embeds: of T5, Llama and the pooled ones, for as many samples as `latents` has.
            latents: `(batch, channels, height, width)`, as the transformer gets them.
            epoch: another one where the weights are others, such as those with an adapter and those without.
        """
        t5, llama3, pooled = embeds
        made_of = (transformer, *embeds)
        context = (latents.shape, epoch, *map(_version, embeds))  # a callback may write into them
        is_known = context == self._context and all(a is b for a, b in zip(made_of, self._made_of))
        if self._has_callback and any(tensor.is_inference() for tensor in embeds):
            is_known = False
        if not is_known:
            self._made_of, self._context = made_of, context
            self._arguments = _prepare(transformer, t5, llama3, latents)
            self.changes += 1
        return self._arguments | {"pooled_embeds": pooled}


def _prepare(
    transformer: HiDreamImageTransformer2DModel, t5: torch.Tensor, llama3: torch.Tensor, latents: torch.Tensor
) -> dict[str, Any]:
    texts = {"encoder_hidden_states_t5": t5, "encoder_hidden_states_llama3": llama3}
    if not _can_prepare(transformer):
        return texts
    text_tokens = t5.shape[1] + 2 * llama3.shape[2]
    positions = transformer.prepare_positions(*latents.shape[-2:], text_tokens, latents.dtype, latents.device)
    t5, llama3 = transformer.project_captions(t5, llama3)
    texts = {"encoder_hidden_states_t5": t5, "encoder_hidden_states_llama3": llama3}
    return {**texts, **positions, "captions_are_projected": True}


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _can_prepare(transformer: nn.Module) -> bool:
    if not hasattr(transformer, "prepare_positions"):  # another class of that name
        return False
    parameters = inspect.signature(transformer.forward).parameters
    takes_more = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    if not takes_more and "captions_are_projected" not in parameters:
        return False
    layers = list(transformer.caption_projection.modules())
    return not any(_has_hooks(module) for module in (transformer, *layers)) and not any(
        # Adapters are scaled, and may be switched, by what happens in a step.
        "forward" in vars(module) or hasattr(module, "active_adapters")
        for module in layers
    )


def _has_hooks(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks or module._forward_hooks
    return bool(hooks) or hasattr(module, "_hf_hook") or bool(hooks_of(module))
