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
The UNet in a denoising loop, and what the steps of the loop share.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .change_watch import ChangeWatch, denoising_loop
from .deep_cache import get_full_steps
from .prompt_projection import project_prompt


if TYPE_CHECKING:
    from ...pipelines.pipeline_utils import DiffusionPipeline


class Denoiser:
    """
    Calls the UNet of a pipeline in the steps of one denoising loop.

    The keys and values of the prompt are computed once for all steps, and with a cache
    ([DeepCache](https://huggingface.co/papers/2312.00858)) most steps reuse the deep features of an earlier one. Both are
    computed anew when a callback has changed what they were computed from.

    Args:
        pipe (`DiffusionPipeline`):
            It has a `unet`, `cross_attention_kwargs` and perhaps a `controlnet`.
        timesteps (`torch.Tensor`):
            One for each call of the UNet.
        prompt_embeds (`torch.Tensor`):
            Of the whole batch, with guidance of both branches.
        cache_interval, cache_layer_id, cache_block_id, cache_schedule, cache_center, cache_power:
            See `StableDiffusionPipeline.__call__`.
        callbacks (sequence):
            What is called between the steps; None for none.
        callback_tensor_inputs (sequence of `str`):
            The names of the tensors that they are given, None for none.

    Attributes:
        host_timesteps (`torch.Tensor`):
            The timesteps in host memory, for the scheduler: it looks up tables there, and a timestep on the device would
            make every step wait for it.
    """

    def __init__(
        self,
        pipe: "DiffusionPipeline",
        timesteps: torch.Tensor,
        prompt_embeds: torch.Tensor,
        *,
        cache_interval: int | None = None,
        cache_layer_id: int = 0,
        cache_block_id: int = 0,
        cache_schedule: str | Sequence[int] = "uniform",
        cache_center: int | None = None,
        cache_power: float = 1.4,
        callbacks: Sequence[Any] = (),
        callback_tensor_inputs: Sequence[str] | None = (),
    ) -> None:
        self._pipe = pipe
        self.host_timesteps = timesteps.cpu()
        if cache_interval is None:
            cache_interval = pipe.unet.cache_interval
        self._full_steps = get_full_steps(len(timesteps), cache_interval, cache_schedule, cache_center, cache_power)
        is_cached = len(self._full_steps) < len(timesteps)
        self._branch = (cache_block_id, cache_layer_id) if is_cached else None
        self._feature = self._condition = self._shape = None
        self._watch = ChangeWatch() if any(callback is not None for callback in callbacks) else None
        self._models: nn.ModuleList | None = None
        self._callback_tensor_inputs = frozenset(callback_tensor_inputs or ())
        self._project(prompt_embeds)

    def loop(self) -> AbstractContextManager[None]:
        """Surrounds all steps."""
        return denoising_loop(self._pipe.unet, self._watch is not None)

    def predict(
        self, step: int, sample: torch.Tensor, timestep: torch.Tensor, condition: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        """
        The UNet's prediction in `step`, counted from 0. `kwargs` are the UNet's.

        What else than the prompt decides the deep features and is not the same in all steps, as the scale of a
        ControlNet, is the `condition`: features of another one are not reused.
        """
        cache_kwargs = {}
        if self._branch is not None:
            # A callback may have changed the batch, by ending classifier free guidance for example, or the size.
            is_stale = sample.shape != self._shape or condition != self._condition
            is_full = step in self._full_steps or is_stale
            cache_kwargs = {"cache_branch": self._branch, "cached_feature": None if is_full else self._feature}
        output = self._pipe.unet(
            sample,
            timestep,
            cross_attention_kwargs=self._pipe.cross_attention_kwargs,
            return_dict=False,
            **self._prompt,
            **cache_kwargs,
            **kwargs,
        )
        if len(output) > 1:
            self._feature, self._condition, self._shape = output[1], condition, sample.shape
        return output[0]

    def before_callbacks(self, prompt_embeds: torch.Tensor, **inputs: Any) -> None:
        """
        Looks at the models, the prompt and further `inputs` that decide the deep features, before callbacks may change
        them. What a model has changed itself, by compiling for example, is no change for what was computed.
        """
        if self._watch is not None:
            self._look(prompt_embeds, inputs)

    def after_callbacks(self, prompt_embeds: torch.Tensor, **inputs: Any) -> None:
        """Looks again, at the same inputs, and lets go of what was computed from anything that has changed."""
        if self._watch is None:
            return
        has_changed = self._look(prompt_embeds, inputs)
        # torch does not count what is written into an inference tensor.
        given = {name: value for name, value in inputs.items() if name in self._callback_tensor_inputs}
        if "prompt_embeds" in self._callback_tensor_inputs:
            given["prompt_embeds"] = prompt_embeds
        leaves = pytree.tree_leaves(given)  # several ControlNets have a list of pictures
        is_rewritable = any(isinstance(leaf, torch.Tensor) and leaf.is_inference() for leaf in leaves)
        if has_changed or is_rewritable:
            self._project(prompt_embeds)
            self._feature = None

    def _look(self, prompt_embeds: torch.Tensor, inputs: dict[str, Any]) -> bool:
        models = [getattr(self._pipe, name, None) for name in ("unet", "controlnet")]
        models = [model for model in models if model is not None]
        if self._models is None or list(self._models) != models:
            self._models = nn.ModuleList(models)
        kwargs = self._pipe.cross_attention_kwargs
        return self._watch.look(self._models, prompt_embeds, kwargs, list(inputs.values()))

    def _project(self, prompt_embeds: torch.Tensor) -> None:
        self._prompt = project_prompt(self._pipe.unet, prompt_embeds, self._pipe.cross_attention_kwargs)
