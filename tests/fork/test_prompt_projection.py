"""A prompt's keys and values are projected once per picture, and no picture changes by a bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import StableDiffusionPipeline
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.attention_processor import AttnProcessor2_0 as DefaultAttnProcessor
from diffusers.models.unets.prompt_projection import project_prompt
from torch import nn

from processors import enable_flash_attention, enable_token_merging
from processors.models.attention_processor import AttnProcessor2_0
from tests.tiny_models import CROSS_ATTENTION_DIM

STEPS = 4
PLAIN: dict[str, Any] = {"cross_attention_kwargs": {}}  # arguments for the processors: the prompt is not projected


class CountingLinear(nn.Linear):
    """A linear layer that knows how often it was called; a hook would count too, but it may look at the prompt."""

    calls: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x)


def draw(pipe: StableDiffusionPipeline, **options: Any) -> torch.Tensor:
    size = {"height": 64, "width": 72, "num_inference_steps": STEPS, "output_type": "latent"}
    return pipe("a red circle", generator=torch.Generator().manual_seed(0), **size | options).images


def middle_block(pipe: StableDiffusionPipeline) -> BasicTransformerBlock:
    return pipe.unet.mid_block.attentions[0].transformer_blocks[0]


def count_projections(pipe: StableDiffusionPipeline) -> CountingLinear:
    """The layer that projects the prompt to the keys of the middle block, counting from now on."""
    layer = middle_block(pipe).attn2.to_k
    layer.__class__ = CountingLinear
    layer.calls = 0
    return layer


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.0}, {"cache_interval": 2}, {"num_images_per_prompt": 2}])
@pytest.mark.parametrize("flags", [(), (enable_flash_attention,), (enable_flash_attention, enable_token_merging)])
def test_the_prompt_is_projected_once_and_the_picture_stays(
    tiny_sd: StableDiffusionPipeline, flags: tuple[Callable[[StableDiffusionPipeline], Any], ...], options: dict
) -> None:
    plain = draw(tiny_sd, **PLAIN, **options)
    for enable in flags:
        enable(tiny_sd)
    layer = count_projections(tiny_sd)
    picture = draw(tiny_sd, **options)
    assert layer.calls == 1
    if enable_token_merging in flags:
        plain = draw(tiny_sd, **PLAIN, **options)
    assert torch.equal(picture, plain)


@pytest.mark.parametrize("listed", [["latents"], ["prompt_embeds"]])
def test_a_callback_that_changes_nothing_costs_no_projection(
    tiny_sd: StableDiffusionPipeline, listed: list[str]
) -> None:
    layer = count_projections(tiny_sd)
    options = {"callback_on_step_end": lambda *_: {}, "callback_on_step_end_tensor_inputs": listed}
    draw(tiny_sd, **options)
    assert layer.calls == 1


@pytest.mark.parametrize("listed", [[], ["prompt_embeds"]])
def test_a_callback_may_change_the_prompt(tiny_sd: StableDiffusionPipeline, listed: list[str]) -> None:
    def change(pipe: StableDiffusionPipeline, step: int, timestep: int, kwargs: dict) -> dict:
        return {"prompt_embeds": torch.ones(2, 77, CROSS_ATTENTION_DIM)} if step == 1 else {}

    options = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": listed}
    changed = draw(tiny_sd, **options)
    assert torch.equal(changed, draw(tiny_sd, **options, **PLAIN))
    assert not torch.equal(changed, draw(tiny_sd))


@pytest.mark.parametrize("inference", [False, True])
def test_a_callback_may_change_the_prompt_in_place(tiny_sd: StableDiffusionPipeline, inference: bool) -> None:
    def change(pipe: StableDiffusionPipeline, step: int, timestep: int, kwargs: dict) -> dict:
        kwargs["prompt_embeds"].mul_(0.5)
        return kwargs

    options = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with torch.inference_mode(inference):
        changed = draw(tiny_sd, **options)
        assert torch.equal(changed, draw(tiny_sd, **options, **PLAIN))
        assert not torch.equal(changed, draw(tiny_sd))


@pytest.mark.parametrize("base", [DefaultAttnProcessor, AttnProcessor2_0])
def test_a_derived_processor_sees_the_text(tiny_sd: StableDiffusionPipeline, base: type) -> None:
    texts: list[torch.Tensor] = []

    class Recorder(base):  # type: ignore[misc]
        def __call__(
            self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any
        ) -> torch.Tensor:
            texts.extend([] if encoder_hidden_states is None else [encoder_hidden_states])
            return super().__call__(attn, hidden_states, encoder_hidden_states)

    expected = draw(tiny_sd)
    tiny_sd.unet.set_attn_processor(Recorder())
    assert torch.equal(draw(tiny_sd), expected)
    assert len(texts) == STEPS * len(tiny_sd.unet.attn_processors) // 2


def set_other_processor(pipe: StableDiffusionPipeline) -> None:
    middle_block(pipe).attn2.set_processor(AttnProcessor())


def replace_a_block_class(pipe: StableDiffusionPipeline) -> None:
    middle_block(pipe).__class__ = type("PackageBlock", (BasicTransformerBlock,), {})


def add_hook(pipe: StableDiffusionPipeline) -> None:
    add_hook_to_module(pipe.unet, ModelHook())


def add_a_hook_of_torch(pipe: StableDiffusionPipeline) -> None:
    middle_block(pipe).register_forward_pre_hook(lambda *_: None)


def replace_a_forward(pipe: StableDiffusionPipeline) -> None:
    block = middle_block(pipe)
    forward = block.forward
    block.forward = lambda *args, **kwargs: forward(*args, **kwargs)


@pytest.mark.parametrize(
    "change", [set_other_processor, replace_a_block_class, add_hook, add_a_hook_of_torch, replace_a_forward]
)
def test_what_does_not_know_projections_gets_the_prompt_itself(
    tiny_sd: StableDiffusionPipeline, change: Callable[[StableDiffusionPipeline], None]
) -> None:
    change(tiny_sd)
    prompt = torch.zeros(2, 77, CROSS_ATTENTION_DIM)
    assert project_prompt(tiny_sd.unet, prompt) == {"encoder_hidden_states": prompt}
    layer = count_projections(tiny_sd)
    draw(tiny_sd)
    assert layer.calls == tiny_sd.num_timesteps


def test_a_unet_takes_a_prompt_or_its_projection_and_not_both(tiny_sd: StableDiffusionPipeline) -> None:
    prompt = torch.zeros(2, 77, CROSS_ATTENTION_DIM)
    projected = project_prompt(tiny_sd.unet, prompt)
    sample = torch.zeros(2, 4, 8, 8)
    assert torch.equal(tiny_sd.unet(sample, 1, **projected).sample, tiny_sd.unet(sample, 1, prompt).sample)
    with pytest.raises(ValueError, match="or a `projected_prompt`, but got both"):
        tiny_sd.unet(sample, 1, **projected | {"encoder_hidden_states": prompt})
