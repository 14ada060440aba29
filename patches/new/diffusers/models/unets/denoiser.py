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

from ...utils import logging
from .change_watch import ChangeWatch, denoising_loop
from .deep_cache import get_full_steps, plan_between
from .forecast import Forecast, NoiseForecast
from .forecast_solver import ForecastSolver
from .prompt_projection import project_prompt


if TYPE_CHECKING:
    from ...pipelines.pipeline_utils import DiffusionPipeline


logger = logging.get_logger(__name__)


class Denoiser:
    """
    Calls the UNet of a pipeline in the steps of one denoising loop, and the scheduler.

    The keys and values of the prompt are computed once for all steps, and with a cache
    ([DeepCache](https://huggingface.co/papers/2312.00858)) most steps reuse the deep features of an earlier one. With
    `cache_forecast` they take a forecast of them instead; such a shallow step runs the conditional branch only, the other
    one is forecast, and there may be steps that run nothing. All is computed anew when a callback has changed what it was
    computed from.

    Args:
        pipe (`DiffusionPipeline`):
            It has a `unet`, a `scheduler`, `cross_attention_kwargs` and perhaps a `controlnet`.
        timesteps (`torch.Tensor`):
            One for each call of the UNet.
        prompt_embeds (`torch.Tensor`):
            Of the whole batch, with guidance of both branches.
        step_kwargs (`dict`):
            What the scheduler's `step` gets beside.
        cache_interval, cache_layer_id, cache_block_id, cache_schedule, cache_center, cache_power, cache_full_steps,
        cache_forecast, cache_between:
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
        step_kwargs: dict[str, Any],
        *,
        cache_interval: int | None = None,
        cache_layer_id: int = 0,
        cache_block_id: int = 0,
        cache_schedule: str | Sequence[int] = "uniform",
        cache_center: int | None = None,
        cache_power: float = 1.4,
        cache_full_steps: int = 12,
        cache_forecast: bool = False,
        cache_between: str | Sequence[int] = "shallow",
        callbacks: Sequence[Any] = (),
        callback_tensor_inputs: Sequence[str] | None = (),
    ) -> None:
        self._pipe = pipe
        self.host_timesteps = timesteps.cpu()
        self._step_kwargs = step_kwargs
        self._times = self.host_timesteps.tolist()
        self._solver = ForecastSolver(pipe.scheduler, self._times, step_kwargs) if cache_forecast else None
        calls = self._solver.calls if self._solver else range(len(timesteps))
        if cache_interval is None:
            cache_interval = pipe.unet.cache_interval
        elif not isinstance(cache_schedule, str) or cache_schedule == "early":
            raise ValueError(
                f"`cache_interval={cache_interval}` has no effect beside a `cache_schedule` that lists or counts full"
                " steps."
            )
        full_steps = get_full_steps(
            len(calls), cache_interval, cache_schedule, cache_center, cache_power, cache_full_steps
        )
        shallow_steps = plan_between(len(calls), full_steps, cache_between)
        is_cached = len(full_steps) < len(calls)
        if cache_forecast and not is_cached:
            raise ValueError("`cache_forecast` has no effect: all steps are full ones. Choose a `cache_schedule`.")
        if not is_cached and cache_between != "shallow":
            raise ValueError(f"`cache_between={cache_between!r}` has no effect: all steps are full ones.")
        if not cache_forecast and len(full_steps) + len(shallow_steps) < len(calls):
            raise ValueError(f"`cache_between={cache_between!r}` leaves steps out, which needs `cache_forecast=True`.")
        self._full_steps = {calls[step] for step in full_steps}
        self._shallow_steps = {calls[step] for step in shallow_steps}
        self._branch = (cache_block_id, cache_layer_id) if is_cached else None
        self._forget()
        self._watch = ChangeWatch() if any(callback is not None for callback in callbacks) else None
        self._models: nn.ModuleList | None = None
        self._callback_tensor_inputs = frozenset(callback_tensor_inputs or ())
        self._has_warned = False
        self._project(prompt_embeds)

    def loop(self) -> AbstractContextManager[None]:
        """Surrounds all steps."""
        return denoising_loop(self._pipe.unet, self._watch is not None)

    def calls_unet(self, step: int, sample: torch.Tensor, condition: Any = None) -> bool:
        """Whether `predict` with the same arguments runs the UNet, and so has a use for what a ControlNet gives."""
        if self._solver is not None and step in self._solver.repeated:
            return False
        return step in self._full_steps or step in self._shallow_steps or self._is_stale(sample, condition)

    def predict(
        self, step: int, sample: torch.Tensor, timestep: torch.Tensor, condition: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        """
        The UNet's prediction in `step`, counted from 0. `kwargs` are the UNet's.

        What else than the prompt decides the deep features and is not the same in all steps, as the scale of a
        ControlNet, is the `condition`: features of another one are not reused.
        """
        if self._branch is None:
            return self._call(sample, timestep, **self._prompt, **kwargs)[0]
        if self._solver is not None and step in self._solver.repeated:
            return self._latents(sample)  # of which no use is made
        if self._is_stale(sample, condition):
            self._forget()
        if self._shape is None or step in self._full_steps:
            prediction, feature = self._call(
                sample, timestep, **self._prompt, **kwargs, cache_branch=self._branch, cached_feature=None
            )
            self._keep(step, sample, prediction, feature)
            self._condition, self._shape = condition, sample.shape
            return prediction
        if self._solver is None:
            return self._call(
                sample, timestep, **self._prompt, **kwargs, cache_branch=self._branch, cached_feature=self._feature
            )[0]
        if step in self._shallow_steps:
            prediction = self._shallow(step, sample, timestep, kwargs)
            return self._noise.shallow(self._times[step], self._latents(sample), prediction)
        return self._noise.skip(self._times[step], self._latents(sample))

    def step(self, step: int, prediction: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The latents after `step`, by the scheduler, for the guided prediction."""
        if self._solver is not None and self._solver.is_own:
            return self._solver.step(step, prediction, latents, self._noise)
        return self._pipe.scheduler.step(
            prediction, self.host_timesteps[step], latents, **self._step_kwargs, return_dict=False
        )[0]

    def before_callbacks(self, prompt_embeds: torch.Tensor, latents: torch.Tensor, **inputs: Any) -> None:
        """
        Looks at the models, the prompt and further `inputs` that decide the deep features, before callbacks may change
        them. What a model has changed itself, by compiling for example, is no change for what was computed. `latents`
        decide what is forecast.
        """
        if self._watch is not None:
            self._look(prompt_embeds, self._inputs(latents, inputs))

    def after_callbacks(self, prompt_embeds: torch.Tensor, latents: torch.Tensor, **inputs: Any) -> None:
        """Looks again, at the same inputs, and lets go of what was computed from anything that has changed."""
        if self._watch is None:
            return
        inputs = self._inputs(latents, inputs)
        has_changed = self._look(prompt_embeds, inputs)
        # torch does not count what is written into an inference tensor.
        given = {name: value for name, value in inputs.items() if name in self._callback_tensor_inputs}
        if "prompt_embeds" in self._callback_tensor_inputs:
            given["prompt_embeds"] = prompt_embeds
        leaves = pytree.tree_leaves(given)  # several ControlNets have a list of pictures
        is_rewritable = any(isinstance(leaf, torch.Tensor) and leaf.is_inference() for leaf in leaves)
        if is_rewritable and self._branch is not None and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "No step reuses another one: torch does not count what is written into tensors under"
                " `torch.inference_mode`, and the callback is given some. Use `torch.no_grad`, or ask for no tensors by"
                " `callback_on_step_end_tensor_inputs=[]`."
            )
        if has_changed or is_rewritable:
            self._project(prompt_embeds)
            self._forget()

    def _is_stale(self, sample: torch.Tensor, condition: Any) -> bool:
        """A callback may have changed the batch, by ending classifier free guidance for example, or the size."""
        if self._shape is None or sample.shape != self._shape or condition != self._condition:
            return True
        return self._noise is not None and self._noise.guidance_scale != self._guidance_scale()

    def _call(self, sample: torch.Tensor, timestep: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        cross_attention_kwargs = self._pipe.cross_attention_kwargs
        return self._pipe.unet(
            sample, timestep, cross_attention_kwargs=cross_attention_kwargs, return_dict=False, **kwargs
        )

    def _shallow(
        self, step: int, sample: torch.Tensor, timestep: torch.Tensor, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """The prediction of the conditional branch, by the outer layers on a forecast of the deep features."""
        if self._conditional_prompt is None:
            self._conditional_prompt = self._conditional(self._prompt, sample)
        return self._call(
            self._conditional(sample, sample),
            timestep,
            **self._conditional_prompt,
            **self._conditional(kwargs, sample),
            cache_branch=self._branch,
            cached_feature=self._deep.at(self._times[step]),
        )[0]

    def _keep(self, step: int, sample: torch.Tensor, prediction: torch.Tensor, feature: torch.Tensor) -> None:
        """What later steps reuse of a full one."""
        if self._solver is None:
            self._feature = feature
            return
        if self._noise is None:
            self._noise, self._deep = NoiseForecast(self._guidance_scale(), self._solver.levels), Forecast()
        self._noise.full(self._times[step], self._latents(sample), prediction)
        self._deep.push(self._times[step], self._conditional(feature, sample))

    def _forget(self) -> None:
        self._feature = self._condition = self._shape = None
        self._noise: NoiseForecast | None = None
        self._deep: Forecast | None = None

    def _guidance_scale(self) -> float | None:
        return self._pipe.guidance_scale if self._pipe.do_classifier_free_guidance else None

    def _conditional(self, value: Any, sample: torch.Tensor) -> Any:
        """The rows of the conditional branch, which is the last one, of whatever has a row for each one of `sample`."""
        branches = 2 if self._pipe.do_classifier_free_guidance else 1

        def rows_of(leaf: Any) -> Any:
            # Not only a tensor: several devices that share a batch have other things with rows.
            has_rows = hasattr(leaf, "chunk") and getattr(leaf, "ndim", 1) > 0 and len(leaf) == len(sample)
            return leaf.chunk(branches)[-1] if has_rows else leaf

        return pytree.tree_map(rows_of, value)

    def _latents(self, sample: torch.Tensor) -> torch.Tensor:
        """What is denoised of the UNet's sample; inpainting has a mask and a picture behind it."""
        return sample[:, : self._pipe.unet.config.out_channels]

    def _inputs(self, latents: torch.Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs if self._solver is None else {**inputs, "latents": latents}

    def _look(self, prompt_embeds: torch.Tensor, inputs: dict[str, Any]) -> bool:
        models = [getattr(self._pipe, name, None) for name in ("unet", "controlnet")]
        models = [model for model in models if model is not None]
        if self._models is None or list(self._models) != models:
            self._models = nn.ModuleList(models)
        kwargs = self._pipe.cross_attention_kwargs
        return self._watch.look(self._models, prompt_embeds, kwargs, list(inputs.values()))

    def _project(self, prompt_embeds: torch.Tensor) -> None:
        self._prompt = project_prompt(self._pipe.unet, prompt_embeds, self._pipe.cross_attention_kwargs)
        self._conditional_prompt: dict[str, Any] | None = None
