"""What a callback changes between two steps is seen by the projected prompt and by DeepCache's feature."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, IPAdapterAttnProcessor2_0
from diffusers.models.unets.change_watch import ChangeWatch, current_loop
from peft import LoraConfig
from torch import nn

from processors import disable_token_merging, enable_flash_attention, enable_token_merging
from tests.fork.test_prompt_projection import PLAIN, middle_block
from tests.tiny_models import CROSS_ATTENTION_DIM

STEPS = 4
CHANGED_AFTER = 0  # the step after which the callback makes its change
Change = Callable[[StableDiffusionPipeline], Any]
MakePipe = Callable[[], StableDiffusionPipeline]


def small_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=CROSS_ATTENTION_DIM,
        norm_num_groups=4,
        use_linear_projection=True,
    )


@pytest.fixture
def make_pipe(tiny_sd: StableDiffusionPipeline) -> MakePipe:
    """Makes equal pipelines with a UNet of their own, so that one may be changed and compared with another."""

    def make() -> StableDiffusionPipeline:
        torch.manual_seed(0)
        parts = tiny_sd.components | {"unet": small_unet().eval()}
        pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def draw(pipe: StableDiffusionPipeline, change: Change, **options: Any) -> torch.Tensor:
    def callback(pipe: StableDiffusionPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        if step == CHANGED_AFTER:
            change(pipe)
        return {}

    size = {"height": 64, "width": 64, "num_inference_steps": STEPS, "output_type": "latent"}
    generator = torch.Generator().manual_seed(0)
    return pipe("a red circle", generator=generator, callback_on_step_end=callback, **size, **options).images


def double_keys(pipe: StableDiffusionPipeline) -> None:
    with torch.no_grad():
        middle_block(pipe).attn2.to_k.weight.mul_(2)


def set_new_keys(pipe: StableDiffusionPipeline) -> None:
    weight = middle_block(pipe).attn2.to_k.weight
    weight.data = 2 * weight.data


def replace_the_layer(pipe: StableDiffusionPipeline) -> None:
    torch.manual_seed(1)
    old = middle_block(pipe).attn2.to_v
    middle_block(pipe).attn2.to_v = nn.Linear(old.in_features, old.out_features, bias=False)


def load_other_weights(pipe: StableDiffusionPipeline) -> None:
    torch.manual_seed(1)
    pipe.unet.load_state_dict(small_unet().state_dict())


def exchange_the_unet(pipe: StableDiffusionPipeline) -> None:
    torch.manual_seed(1)
    pipe.unet = small_unet().eval()


def set_processors(pipe: StableDiffusionPipeline) -> None:
    class Louder(AttnProcessor):
        def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return 1.5 * super().__call__(*args, **kwargs)

    pipe.unet.set_attn_processor(Louder())


def add_a_hook(pipe: StableDiffusionPipeline) -> None:
    middle_block(pipe).attn2.to_k.register_forward_hook(lambda module, inputs, output: 2 * output)


def enable_freeu(pipe: StableDiffusionPipeline) -> None:
    pipe.enable_freeu(s1=0.5, s2=0.2, b1=1.5, b2=1.6)


def merge_tokens(pipe: StableDiffusionPipeline) -> None:
    enable_token_merging(pipe, ratio=0.5, max_downsample=8)


def add_lora(pipe: StableDiffusionPipeline) -> None:
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"])
    pipe.unet.add_adapter(config, "style")


def halve_lora(pipe: StableDiffusionPipeline) -> None:
    pipe.unet.set_adapters(["style"], [0.5])


def switch_lora_off(pipe: StableDiffusionPipeline) -> None:
    pipe.unet.disable_lora()


def fuse_half_of_lora(pipe: StableDiffusionPipeline) -> None:
    pipe.unet.fuse_lora(lora_scale=0.5)


def delete_lora(pipe: StableDiffusionPipeline) -> None:
    pipe.unet.delete_adapters("style")


CHANGES: list[Change] = [
    double_keys,
    set_new_keys,
    replace_the_layer,
    load_other_weights,
    exchange_the_unet,
    set_processors,
    add_a_hook,
    enable_freeu,
    merge_tokens,
    add_lora,
]
LORA_CHANGES: list[Change] = [halve_lora, switch_lora_off, fuse_half_of_lora, delete_lora]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_steps_is_in_the_projected_prompt(make_pipe: MakePipe, change: Change) -> None:
    picture = draw(make_pipe(), change)
    assert torch.equal(picture, draw(make_pipe(), change, **PLAIN))
    assert not torch.equal(picture, draw(make_pipe(), lambda _: None))


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_steps_ends_the_reuse_of_the_cached_feature(make_pipe: MakePipe, change: Change) -> None:
    picture = draw(make_pipe(), change, cache_schedule=[0])
    assert torch.equal(picture, draw(make_pipe(), change, cache_schedule=[0, CHANGED_AFTER + 1]))


@pytest.mark.parametrize("change", LORA_CHANGES)
@pytest.mark.parametrize("options", [{}, {"cache_schedule": [0]}])
def test_a_lora_may_change_between_steps(make_pipe: MakePipe, change: Change, options: dict[str, Any]) -> None:
    def with_lora() -> StableDiffusionPipeline:
        pipe = make_pipe()
        add_lora(pipe)
        return pipe

    without_reuse = {"cache_schedule": [0, CHANGED_AFTER + 1]} if options else {}
    picture = draw(with_lora(), change, **options)
    assert torch.equal(picture, draw(with_lora(), change, **PLAIN, **without_reuse))
    assert not torch.equal(picture, draw(with_lora(), lambda _: None, **options))


SWITCHES: list[Change] = [
    lambda pipe: pipe.unet.set_default_attn_processor(),
    lambda pipe: pipe.enable_attention_slicing(1),
    lambda pipe: pipe.unet.set_attention_backend("native"),
    lambda pipe: pipe.fuse_qkv_projections(),
]


@pytest.mark.parametrize("switch", SWITCHES, ids=["default processor", "slicing", "backend", "fused projections"])
def test_switches_of_diffusers_work_before_and_between_steps(make_pipe: MakePipe, switch: Change) -> None:
    assert torch.equal(draw(make_pipe(), switch), draw(make_pipe(), switch, **PLAIN))
    switched, plain = make_pipe(), make_pipe()
    switch(switched)
    switch(plain)
    assert torch.equal(draw(switched, lambda _: None), draw(plain, lambda _: None, **PLAIN))


def test_token_merging_may_be_switched_off_between_steps(make_pipe: MakePipe) -> None:
    def merging() -> StableDiffusionPipeline:
        pipe = make_pipe()
        enable_flash_attention(pipe)
        merge_tokens(pipe)
        return pipe

    picture = draw(merging(), disable_token_merging, cache_schedule=[0])
    assert torch.equal(picture, draw(merging(), disable_token_merging, cache_schedule=[0, CHANGED_AFTER + 1]))


@pytest.mark.parametrize("callback", ["callback_on_step_end", "callback"])
def test_a_callback_that_changes_nothing_keeps_the_cached_feature(
    tiny_sd: StableDiffusionPipeline, callback: str
) -> None:
    full_steps: list[int] = []
    tiny_sd.unet.mid_block.register_forward_hook(lambda *_: full_steps.append(1))
    nothing = {"callback_on_step_end": lambda *_: {}, "callback": lambda *_: None}[callback]
    steps = {"callback_steps": 1} if callback == "callback" else {}
    tiny_sd(
        "a cat",
        num_inference_steps=STEPS,
        height=64,
        width=64,
        cache_interval=3,
        output_type="latent",
        **{callback: nothing},
        **steps,
    )
    assert len(full_steps) == 2


def test_the_old_kind_of_callback_is_watched_too(make_pipe: MakePipe) -> None:
    def draw_with(**options: Any) -> torch.Tensor:
        pipe = make_pipe()

        def callback(step: int, timestep: torch.Tensor, latents: torch.Tensor) -> None:
            if step == CHANGED_AFTER:
                double_keys(pipe)

        generator = torch.Generator().manual_seed(0)
        size = {"height": 64, "width": 64, "num_inference_steps": STEPS, "output_type": "latent"}
        return pipe("a cat", generator=generator, callback=callback, callback_steps=1, **size, **options).images

    assert torch.equal(draw_with(), draw_with(**PLAIN))


def test_inputs_processors_and_structure_are_watched() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Module())
    model[1].processor = IPAdapterAttnProcessor2_0(8, CROSS_ATTENTION_DIM)
    prompt = torch.zeros(1)
    watch = ChangeWatch()
    assert watch.look(model, prompt, None)
    assert not watch.look(model, prompt, None)
    for change in (
        lambda: model[1].processor.scale.__setitem__(0, 0.0),
        lambda: model.append(nn.ReLU()),
        lambda: prompt.add_(1),
    ):
        change()
        assert watch.look(model, prompt, None)
        assert not watch.look(model, prompt, None)
    assert watch.look(model, prompt.clone(), None)
    assert watch.look(model, prompt, {"scale": 0.5})


def test_what_a_step_changes_itself_does_not_end_the_reuse(tiny_sd: StableDiffusionPipeline) -> None:
    """As a processor that counts its calls does, or a graph that is compiled in the first of them."""

    class Counting(AttnProcessor):
        calls = 0

        def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.calls += 1
            return super().__call__(*args, **kwargs)

    tiny_sd.unet.set_attn_processor(Counting())
    full_steps: list[int] = []
    tiny_sd.unet.mid_block.register_forward_hook(lambda *_: full_steps.append(1))
    draw(tiny_sd, lambda _: None, cache_schedule=[0])
    assert len(full_steps) == 1


def test_a_loop_without_callbacks_or_hooks_has_a_name(tiny_sd: StableDiffusionPipeline) -> None:
    seen: list[object | None] = []

    class Seeing(AttnProcessor):
        def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            seen.append(current_loop())
            return super().__call__(*args, **kwargs)

    tiny_sd.unet.set_attn_processor(Seeing())
    names = []
    for _ in range(2):
        tiny_sd("a cat", height=64, width=64, num_inference_steps=STEPS, output_type="latent")
        names.append(set(seen))
        seen.clear()
    assert len(names[0]) == len(names[1]) == 1
    assert None not in names[0] and names[0] != names[1]
    draw(tiny_sd, lambda _: None)
    tiny_sd.unet.mid_block.register_forward_hook(lambda *_: None)
    tiny_sd("a cat", height=64, width=64, num_inference_steps=STEPS, output_type="latent")
    assert set(seen) == {None}
    assert current_loop() is None
