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

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Callable

import PIL.Image
import torch

from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5EncoderModel,
    T5Tokenizer,
)

from ...image_processor import PipelineImageInput, VaeImageProcessor
from ...models import AutoencoderKL, HiDreamImageTransformer2DModel
from ...schedulers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from ...utils import replace_example_docstring
from .editing_images import FittedImage, fit_images
from .pipeline_hidream_image import HiDreamImagePipeline, calculate_shift, retrieve_timesteps
from .pipeline_output import HiDreamImagePipelineOutput
from .step_arguments import StepArguments
from .step_caches import StepCaches


TARGET_MARK = "Target Image Description:"  # what HiDream-E1's prompts have before the description of the result

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from transformers import AutoTokenizer, LlamaForCausalLM
        >>> from diffusers import HiDreamImageEditingPipeline
        >>> from diffusers.utils import load_image

        >>> llama = "meta-llama/Llama-3.1-8B-Instruct"
        >>> pipe = HiDreamImageEditingPipeline.from_pretrained(
        ...     "HiDream-ai/HiDream-E1-Full",
        ...     tokenizer_4=AutoTokenizer.from_pretrained(llama),
        ...     text_encoder_4=LlamaForCausalLM.from_pretrained(llama, dtype=torch.bfloat16),
        ...     dtype=torch.bfloat16,
        ... ).to("cuda")
        >>> image = pipe(
        ...     "Editing Instruction: Make the sky red. Target Image Description: A lake under a red sky.",
        ...     image=load_image("lake.png"),
        ...     size_policy="e1-full",
        ...     image_guidance_scale=4.0,
        ... ).images[0]
        ```
"""


def guide_edit(
    prediction: torch.Tensor, guidance_scale: float, image_guidance_scale: float, clip_cfg_norm: bool
) -> torch.Tensor:
    """
    Combines the three branches of an editing step, as HiDream-E1 does.

    Args:
        prediction (`torch.Tensor` of shape `(3 * batch_size, channels, height, width)`):
            Without the picture, with it and the negative prompt, with it and the prompt. The first has the prompt with
            `clip_cfg_norm`, else the negative prompt.
        clip_cfg_norm (`bool`):
            Whether guidance by the prompt may make no position's vector longer than that of the third branch.

    Returns:
        `torch.Tensor` of shape `(batch_size, channels, height, width)`.
    """
    blind, negative, full = prediction.chunk(3)
    if not clip_cfg_norm:
        return blind + image_guidance_scale * (negative - blind) + guidance_scale * (full - negative)
    guided = negative + guidance_scale * (full - negative)
    length = torch.norm(guided, dim=1, keepdim=True)
    guided = guided * (torch.norm(full, dim=1, keepdim=True) / (length + 1e-8)).clamp(min=0.0, max=1.0)
    return blind + image_guidance_scale * (guided - blind)


class HiDreamImageEditingPipeline(HiDreamImagePipeline):
    r"""
    Changes pictures as instructions say, with HiDream-E1 and E1.1 (https://huggingface.co/papers/2505.22705).

    Each step sees the noisy picture and the source side by side. The last steps may refine: a model that draws without
    a source, [`HiDreamImagePipeline`]'s, goes on towards the description of the result. It is a second transformer, or
    the same one without its editing adapter.

    Components are those of [`HiDreamImagePipeline`]. Llama comes with neither of the checkpoints: pass `text_encoder_4`
    and `tokenizer_4`, or None for both and embeddings to each call.
    """

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer_2: CLIPTokenizer,
        text_encoder_3: T5EncoderModel,
        tokenizer_3: T5Tokenizer,
        text_encoder_4: LlamaForCausalLM,
        tokenizer_4: PreTrainedTokenizerFast,
        transformer: HiDreamImageTransformer2DModel,
    ):
        super().__init__(
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
            text_encoder_4=text_encoder_4,
            tokenizer_4=tokenizer_4,
            transformer=transformer,
        )
        self.image_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor * 2,
            vae_latent_channels=self.vae.config.latent_channels if getattr(self, "vae", None) is not None else 16,
        )

    def prepare_image_latents(self, image: torch.Tensor, batch_size: int, dtype, device) -> torch.Tensor:
        """
        Encodes the sources, without noise.

        Args:
            image (`torch.Tensor` of shape `(images, channels, height, width)`):
                In [-1, 1], or latents as `output_type="latent"` returns them, told by their channels.

        Returns:
            `torch.Tensor` of shape `(batch_size, latent_channels, latent_height, latent_width)`, each picture's copies
            beside each other.
        """
        if image.shape[1] == self.vae.config.latent_channels:
            latents = image
        else:
            latents = self.vae.encode(image.to(device=device, dtype=self.vae.dtype)).latent_dist.mode()
            latents = (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor
        latents = latents.to(device=device, dtype=dtype)
        return latents.repeat_interleave(batch_size // len(latents), dim=0)

    @property
    def image_guidance_scale(self):
        return self._image_guidance_scale

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        prompt_3: str | list[str] | None = None,
        prompt_4: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        num_inference_steps: int = 50,
        sigmas: list[float] | None = None,
        guidance_scale: float = 5.0,
        image_guidance_scale: float = 2.0,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        negative_prompt_3: str | list[str] | None = None,
        negative_prompt_4: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.FloatTensor | None = None,
        prompt_embeds_t5: torch.FloatTensor | None = None,
        prompt_embeds_llama3: torch.FloatTensor | None = None,
        negative_prompt_embeds_t5: torch.FloatTensor | None = None,
        negative_prompt_embeds_llama3: torch.FloatTensor | None = None,
        pooled_prompt_embeds: torch.FloatTensor | None = None,
        negative_pooled_prompt_embeds: torch.FloatTensor | None = None,
        target_prompt: str | list[str] | None = None,
        target_prompt_embeds_t5: torch.FloatTensor | None = None,
        target_prompt_embeds_llama3: torch.FloatTensor | None = None,
        target_pooled_prompt_embeds: torch.FloatTensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        max_sequence_length: int = 128,
        refine_strength: float = 0.0,
        refiner: HiDreamImageTransformer2DModel | None = None,
        clip_cfg_norm: bool = True,
        size_policy: str | None = None,
        enlarge: bool = False,
        **kwargs,
    ) -> HiDreamImagePipelineOutput | tuple:
        r"""
        Edits pictures.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What to change; E1-Full expects `"Editing Instruction: ... Target Image Description: ..."`. One for each
                picture, or one for all.
            prompt_2, prompt_3, prompt_4 (`str` or `list[str]`, *optional*):
                For the second CLIP, T5 and Llama, where they are to read something else than `prompt`.
            image (`PIL.Image.Image`, `list`, `torch.Tensor` or `np.ndarray`):
                The sources, all of one size: one for each prompt, or one for all. Pictures may be of any mode. Tensors
                `(images, channels, height, width)` are in [0, 1], or latents as `output_type="latent"` returns them.
            num_inference_steps (`int`, defaults to 50):
                Denoising steps.
            sigmas (`list[float]`, *optional*):
                Of schedulers that take them.
            guidance_scale (`float`, defaults to 5.0):
                How strongly the prompt guides. Up to 1 turns all guidance off, that by the picture, too.
            image_guidance_scale (`float`, defaults to 2.0):
                How strongly the source guides.
            negative_prompt, negative_prompt_2, negative_prompt_3, negative_prompt_4 (`str` or `list[str]`, *optional*):
                What the result should not be.
            num_images_per_prompt (`int`, defaults to 1):
                Results of each pair of prompt and picture, beside each other.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One for all, or one for each result.
            latents (`torch.FloatTensor`, *optional*):
                Noise to start from, of shape `(results, 16, height / 8, width / 8)`.
            prompt_embeds_t5, prompt_embeds_llama3, pooled_prompt_embeds, negative_prompt_embeds_t5, ...
            (`torch.FloatTensor`, *optional*):
                In the place of texts, as [`~HiDreamImagePipeline.encode_prompt`] returns them for one result each:
                `(prompts, tokens, channels)`, `(layers, prompts, tokens, channels)` and `(prompts, channels)`.
            target_prompt (`str` or `list[str]`, *optional*):
                The description of the result, towards which refining goes. By default what follows "Target Image
                Description:" in the prompt, without that the prompt.
            target_prompt_embeds_t5, target_prompt_embeds_llama3, target_pooled_prompt_embeds
            (`torch.FloatTensor`, *optional*):
                In its place.
            output_type (`str`, defaults to `"pil"`):
                "pil", "np", "pt" or "latent".
            attention_kwargs (`dict`, *optional*):
                Passed on to the transformer: `{"scale": ...}` is that of LoRA adapters.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback(pipe, step, timestep, tensors)`; what it returns replaces tensors of
                the steps that follow, up to where refining begins with its own embeddings.
            max_sequence_length (`int`, defaults to 128):
                Tokens of a prompt.
            refine_strength (`float`, defaults to 0.0):
                The share of the steps, the last ones, that refine: from step `int(steps * (1 - refine_strength))` on.
            refiner ([`HiDreamImageTransformer2DModel`], *optional*):
                What refines, on the device of the pipeline. By default the pipeline's transformer without its adapter.
            clip_cfg_norm (`bool`, defaults to `True`):
                See [`guide_edit`].
            size_policy (`str`, *optional*):
                Brings PIL pictures to the size that a model was trained for, "e1.1" or "e1-full", and results back, see
                `fit_image`. None: sides are rounded down to multiples of 16, and results have that size.
            enlarge (`bool`, defaults to `False`):
                Whether "e1.1" scales small pictures up.

        Raises:
            ValueError: inputs that do not fit each other, or nothing to refine with.

        Examples:

        Returns:
            [`HiDreamImagePipelineOutput`] or, without `return_dict`, a tuple of the results.
        """
        self._refuse_unknown_arguments(kwargs)
        self.check_inputs(
            prompt,
            prompt_2,
            prompt_3,
            prompt_4,
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            negative_prompt_3=negative_prompt_3,
            negative_prompt_4=negative_prompt_4,
            prompt_embeds_t5=prompt_embeds_t5,
            prompt_embeds_llama3=prompt_embeds_llama3,
            negative_prompt_embeds_t5=negative_prompt_embeds_t5,
            negative_prompt_embeds_llama3=negative_prompt_embeds_llama3,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        if image is None:
            raise ValueError(
                "`image` is missing: give the picture to edit, or draw without one by HiDreamImagePipeline"
            )
        for name, number in (
            ("num_inference_steps", num_inference_steps),
            ("num_images_per_prompt", num_images_per_prompt),
        ):
            if number < 1:
                raise ValueError(f"`{name}` must be at least 1, not {number}")
        if isinstance(prompt, list) and not prompt:
            raise ValueError("`prompt` is an empty list: give at least one")
        if sigmas is not None and isinstance(self.scheduler, UniPCMultistepScheduler):
            raise ValueError("`sigmas` have no effect on UniPCMultistepScheduler, which makes its own")
        if enlarge and size_policy is None:
            raise ValueError("`enlarge` has no effect without `size_policy`")
        if size_policy is not None and output_type not in ("pil", "latent"):
            raise ValueError(f"`size_policy` brings results back to their size as PIL pictures, not as {output_type!r}")
        self._check_refinement(refine_strength, refiner)

        self._guidance_scale = guidance_scale
        self._image_guidance_scale = image_guidance_scale
        self._attention_kwargs = attention_kwargs
        self._interrupt = False
        device = self._execution_device

        # 1. Sources
        image, fitted = fit_images(image, size_policy, enlarge)
        image = self.image_processor.preprocess(image)
        prompts = len(prompt) if isinstance(prompt, list) else 1 if prompt is not None else len(pooled_prompt_embeds)
        if 1 not in (prompts, len(image)) and prompts != len(image):
            raise ValueError(f"{prompts} prompts and {len(image)} pictures: give as many of both, or one of either")
        batch_size = max(prompts, len(image)) * num_images_per_prompt
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for {batch_size} results: give one, or one for each")

        # 2. Texts
        encode = _Encoder(self, prompts, batch_size, max_sequence_length)
        embeds, negative_embeds = encode(
            (prompt, prompt_2, prompt_3, prompt_4),
            (negative_prompt, negative_prompt_2, negative_prompt_3, negative_prompt_4),
            (prompt_embeds_t5, prompt_embeds_llama3, pooled_prompt_embeds),
            (negative_prompt_embeds_t5, negative_prompt_embeds_llama3, negative_pooled_prompt_embeds),
        )
        target_embeds = embeds
        if refine_strength > 0:
            given = (target_prompt_embeds_t5, target_prompt_embeds_llama3, target_pooled_prompt_embeds)
            target_embeds = encode.target(prompt, target_prompt, given) or embeds
        if self.do_classifier_free_guidance:
            first = embeds if clip_cfg_norm else negative_embeds
            embeds = _join(first, negative_embeds, embeds)
            target_embeds = _join(negative_embeds, target_embeds)

        # 3. Latents
        dtype = embeds[2].dtype
        image_latents = self.prepare_image_latents(image, batch_size, dtype, device)
        self._check_tokens(*image_latents.shape[-2:])
        if refine_strength > 0:
            (refiner or self.transformer).check_size(*image_latents.shape[-2:])
        height, width = (side * self.vae_scale_factor for side in image_latents.shape[-2:])
        latents = self.prepare_latents(
            batch_size, self.transformer.config.in_channels, height, width, dtype, device, generator, latents
        )
        if self.do_classifier_free_guidance:
            image_latents = torch.cat([torch.zeros_like(image_latents), image_latents, image_latents])

        # 4. Steps
        if isinstance(self.scheduler, UniPCMultistepScheduler):
            self.scheduler.set_timesteps(num_inference_steps, device=device)
            timesteps = self.scheduler.timesteps
        else:
            mu = calculate_shift(self.transformer.max_seq)
            timesteps, num_inference_steps = retrieve_timesteps(
                self.scheduler, num_inference_steps, device, sigmas=sigmas, mu=mu
            )
        self._num_timesteps = len(timesteps)
        refine_start = int(num_inference_steps * (1.0 - refine_strength))
        denoiser, is_refining = self.transformer, False
        step_arguments, caches = StepArguments(callback_on_step_end is not None), StepCaches()

        with self.progress_bar(total=len(timesteps)) as progress_bar, ExitStack() as stack, caches.forgotten_at_end():
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                if i >= refine_start and not is_refining:
                    denoiser, is_refining, embeds = stack.enter_context(self._refining(refiner)), True, target_embeds

                branches = len(embeds[2]) // batch_size  # a callback may end guidance
                model_input = torch.cat([latents] * branches)
                if not is_refining:
                    model_input = torch.cat([model_input, image_latents[-len(model_input) :]], dim=-1)
                constant = step_arguments(denoiser, embeds, model_input, is_refining)
                with caches.context(denoiser, "refine" if is_refining else "edit", step_arguments.changes):
                    prediction = denoiser(
                        hidden_states=model_input,
                        timesteps=t.expand(len(model_input)),
                        **constant,
                        attention_kwargs=self.attention_kwargs,
                        return_dict=False,
                    )[0]
                prediction = -prediction[..., : latents.shape[-1]]
                if branches == 3:
                    prediction = guide_edit(prediction, self.guidance_scale, self.image_guidance_scale, clip_cfg_norm)
                elif branches == 2:
                    negative, full = prediction.chunk(2)
                    prediction = negative + self.guidance_scale * (full - negative)
                latents = self.scheduler.step(prediction, t, latents, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = {"latents": latents} | dict(zip(self._callback_tensor_inputs[1:], embeds))
                    wanted = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    tensors |= callback_on_step_end(self, i, t, wanted)
                    latents, *embeds = (tensors[name] for name in self._callback_tensor_inputs)
                progress_bar.update()

        # 5. Results
        if output_type == "latent":
            results = latents
        else:
            latents = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
            results = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
            results = self.image_processor.postprocess(results, output_type=output_type)
            if fitted is not None and output_type == "pil":
                results = _restore(results, fitted)
        self.maybe_free_model_hooks()
        return HiDreamImagePipelineOutput(images=results) if return_dict else (results,)

    def _check_tokens(self, height: int, width: int) -> None:
        """What the transformer takes of latents beside their sources: what is not square it pads to its `max_seq`."""
        tokens = height * 2 * width // self.transformer.config.patch_size**2
        if height != 2 * width and tokens > self.transformer.max_seq:
            scale = self.vae_scale_factor
            raise ValueError(
                f"a picture of {width * scale} x {height * scale} pixels beside its source has {tokens} tokens, and "
                f"the transformer takes {self.transformer.max_seq}: take a smaller picture, or `size_policy`"
            )

    def _check_refinement(self, refine_strength: float, refiner: HiDreamImageTransformer2DModel | None) -> None:
        if not 0 <= refine_strength <= 1:
            raise ValueError(f"`refine_strength` must be from 0 to 1, not {refine_strength}")
        if refine_strength == 0:
            return
        if refiner is None:
            adapters = _adapters_on(self.transformer)
            if any(layer.merged for layer in adapters):
                raise ValueError("the editing adapter is fused: call unfuse_lora(), so that refining can do without")
            if not adapters:
                raise ValueError(
                    f"`refine_strength` is {refine_strength}, and there is nothing to refine with: pass `refiner`, a "
                    "HiDreamImageTransformer2DModel such as HiDream-I1's, or load the editing adapter (E1-Full's) "
                    "and leave it switched on"
                )
            return
        parameter, device = next(refiner.parameters()), self._execution_device
        if parameter.device != device and not hasattr(refiner, "_hf_hook"):
            raise ValueError(f"the refiner is on {parameter.device} and the pipeline on {device}: call refiner.to()")
        if refiner.dtype != self.transformer.dtype:
            raise ValueError(f"the refiner is {refiner.dtype} and the transformer {self.transformer.dtype}")

    @contextmanager
    def _refining(self, refiner: HiDreamImageTransformer2DModel | None) -> Iterator[HiDreamImageTransformer2DModel]:
        """What refines. The transformer has its adapter back afterwards, however that comes about."""
        if refiner is not None:
            yield refiner
            return
        adapters = _adapters_on(self.transformer)
        try:
            for layer in adapters:
                layer._disable_adapters = True  # PEFT's own switch also sets which parameters want gradients
            yield self.transformer
        finally:
            for layer in adapters:
                layer._disable_adapters = False


class _Encoder:
    """
    Encodes the texts of a call. Embeddings are `(t5, llama, pooled)`, for each of its results.

    Args:
        prompts: how many the call has.
        results: how many it makes, a multiple of that.
    """

    def __init__(
        self, pipe: HiDreamImageEditingPipeline, prompts: int, results: int, max_sequence_length: int
    ) -> None:
        self.pipe, self.prompts, self.results = pipe, prompts, results
        self.max_sequence_length = max_sequence_length

    def __call__(self, prompts, negative_prompts, given, negative_given) -> tuple[tuple, tuple]:
        self._require_encoders(prompts[0], given, "")
        if self.pipe.do_classifier_free_guidance:
            self._require_encoders("", negative_given, "negative_")
        t5, negative_t5, llama, negative_llama, pooled, negative_pooled = self.pipe.encode_prompt(
            *prompts,
            negative_prompt="" if negative_prompts[0] is None else negative_prompts[0],
            negative_prompt_2=negative_prompts[1],
            negative_prompt_3=negative_prompts[2],
            negative_prompt_4=negative_prompts[3],
            do_classifier_free_guidance=self.pipe.do_classifier_free_guidance,
            prompt_embeds_t5=given[0],
            prompt_embeds_llama3=given[1],
            pooled_prompt_embeds=given[2],
            negative_prompt_embeds_t5=negative_given[0],
            negative_prompt_embeds_llama3=negative_given[1],
            negative_pooled_prompt_embeds=negative_given[2],
            num_images_per_prompt=self.results // self.prompts,
            max_sequence_length=self.max_sequence_length,
        )
        return (t5, llama, pooled), (negative_t5, negative_llama, negative_pooled)

    def target(self, prompt: Any, target_prompt: Any, given: tuple) -> tuple | None:
        """
        Of the description of the result, None where that is the prompt.

        Raises:
            ValueError: some embeddings are missing, or the descriptions are neither one nor as many as prompts.
        """
        missing = [embeds is None for embeds in given]
        if all(missing) and target_prompt is None:
            target_prompt = describe_target(prompt)
            if target_prompt is None or target_prompt == prompt:
                return None
        elif any(missing) and target_prompt is None:
            raise ValueError(
                "give `target_prompt_embeds_t5`, `target_prompt_embeds_llama3` and `target_pooled_prompt_embeds` all "
                "three, or `target_prompt`"
            )
        texts = [target_prompt] if isinstance(target_prompt, str) else target_prompt
        count = len(given[2] if texts is None else texts)
        if count not in (1, self.prompts):
            raise ValueError(f"{count} descriptions of results and {self.prompts} prompts: give one, or one for each")
        self._require_encoders(texts, given, "target_")
        t5, _, llama, _, pooled, _ = self.pipe.encode_prompt(
            texts,
            do_classifier_free_guidance=False,
            prompt_embeds_t5=given[0],
            prompt_embeds_llama3=given[1],
            pooled_prompt_embeds=given[2],
            num_images_per_prompt=self.results // count,
            max_sequence_length=self.max_sequence_length,
        )
        return t5, llama, pooled

    def _require_encoders(self, prompt: Any, given: tuple, prefix: str) -> None:
        """
        Raises:
            ValueError: a text is to be read, and a model for that is absent.
        """
        names = (f"{prefix}prompt_embeds_t5", f"{prefix}prompt_embeds_llama3", f"{prefix}pooled_prompt_embeds")
        readers = (("text_encoder_3",), ("text_encoder_4",), ("text_encoder", "text_encoder_2"))
        for name, embeds, components in zip(names, given, readers):
            absent = [component for component in components if getattr(self.pipe, component, None) is None]
            if embeds is None and prompt is not None and absent:
                llama = " (Llama 3.1 8B Instruct, a LlamaForCausalLM)" if absent == ["text_encoder_4"] else ""
                raise ValueError(
                    f"the pipeline has no `{absent[0]}`{llama} to read a prompt with: pass it and its tokenizer to "
                    f"`from_pretrained`, or `{name}` to this call"
                )


def describe_target(prompt: str | list[str] | None) -> str | list[str] | None:
    """What prompts say of the result, each itself where it says nothing of it."""
    if isinstance(prompt, list):
        return [describe_target(each) for each in prompt]
    if prompt is None or TARGET_MARK not in prompt:
        return prompt
    return prompt.split(TARGET_MARK)[1].strip()


def _join(*parts: tuple) -> tuple:
    """Branches of embeddings, one after the other along the batch; None where there is none."""
    return tuple(torch.cat(tensors, dim=1 if tensors[0].dim() == 4 else 0) for tensors in zip(*parts))


def _restore(results: list[PIL.Image.Image], fitted: list[FittedImage]) -> list[PIL.Image.Image]:
    copies = len(results) // len(fitted)
    return [fitted[number // copies].restore(result) for number, result in enumerate(results)]


def _adapters_on(transformer: HiDreamImageTransformer2DModel) -> list[Any]:
    """The layers with adapters that are in effect."""
    layers = [layer for layer in transformer.modules() if hasattr(layer, "lora_A") and hasattr(layer, "merged")]
    return [layer for layer in layers if layer.active_adapters and not layer.disable_adapters]
