"""A prompt's keys and values are projected once per picture, and no picture changes by a bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import StableDiffusionPipeline
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.unets.prompt_projection import project_prompt

from processors import enable_flash_attention, enable_token_merging
from tests.tiny_models import CROSS_ATTENTION_DIM

STEPS = 4
PLAIN: dict[str, Any] = {"cross_attention_kwargs": {}}  # arguments for the processors: the prompt is not constant


def draw(pipe: StableDiffusionPipeline, **options: Any) -> torch.Tensor:
    size = {"height": 64, "width": 72, "num_inference_steps": STEPS, "output_type": "latent"}
    return pipe("a red circle", generator=torch.Generator().manual_seed(0), **size, **options).images


def count_projections(pipe: StableDiffusionPipeline) -> list[int]:
    calls: list[int] = []
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    block.attn2.to_k.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.0}, {"cache_interval": 2}, {"num_images_per_prompt": 2}])
@pytest.mark.parametrize("flags", [(), (enable_flash_attention,), (enable_flash_attention, enable_token_merging)])
def test_the_prompt_is_projected_once_and_the_picture_stays(
    tiny_sd: StableDiffusionPipeline, flags: tuple[Callable[[StableDiffusionPipeline], None], ...], options: dict
) -> None:
    plain = draw(tiny_sd, **PLAIN, **options)
    for enable in flags:
        enable(tiny_sd)
    calls = count_projections(tiny_sd)
    picture = draw(tiny_sd, **options)
    assert len(calls) == 1
    if enable_token_merging in flags:
        plain = draw(tiny_sd, **PLAIN, **options)
    assert torch.equal(picture, plain)


@pytest.mark.parametrize("listed", [[], ["prompt_embeds"]])
def test_a_callback_may_change_the_prompt(tiny_sd: StableDiffusionPipeline, listed: list[str]) -> None:
    def change(pipe: StableDiffusionPipeline, step: int, timestep: int, kwargs: dict) -> dict:
        return {"prompt_embeds": torch.ones(2, 77, CROSS_ATTENTION_DIM)} if step == 1 else {}

    options = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": listed}
    changed = draw(tiny_sd, **options)
    assert torch.equal(changed, draw(tiny_sd, **options, **PLAIN))
    assert not torch.equal(changed, draw(tiny_sd))


def test_a_callback_may_change_the_prompt_in_place(tiny_sd: StableDiffusionPipeline) -> None:
    def change(pipe: StableDiffusionPipeline, step: int, timestep: int, kwargs: dict) -> dict:
        kwargs["prompt_embeds"].mul_(0.5)
        return kwargs

    options = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    changed = draw(tiny_sd, **options)
    assert torch.equal(changed, draw(tiny_sd, **options, **PLAIN))
    assert not torch.equal(changed, draw(tiny_sd))


def set_other_processor(pipe: StableDiffusionPipeline) -> None:
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(AttnProcessor())


def replace_a_block_class(pipe: StableDiffusionPipeline) -> None:
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    block.__class__ = type("PackageBlock", (BasicTransformerBlock,), {})


def add_hook(pipe: StableDiffusionPipeline) -> None:
    add_hook_to_module(pipe.unet, ModelHook())


@pytest.mark.parametrize("change", [set_other_processor, replace_a_block_class, add_hook])
def test_what_does_not_know_projections_gets_the_prompt_itself(
    tiny_sd: StableDiffusionPipeline, change: Callable[[StableDiffusionPipeline], None]
) -> None:
    change(tiny_sd)
    prompt = torch.zeros(2, 77, CROSS_ATTENTION_DIM)
    assert project_prompt(tiny_sd.unet, prompt) is prompt
    calls = count_projections(tiny_sd)
    draw(tiny_sd)
    assert len(calls) == tiny_sd.num_timesteps
