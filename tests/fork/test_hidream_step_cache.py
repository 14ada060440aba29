"""Step caching: diffusers' cache hooks on HiDream's transformer, in the loops of its pipelines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    HiDreamImageEditingPipeline,
    HiDreamImagePipeline,
    MagCacheConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_first_block_cache
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from processors import disable_step_cache, enable_fused_kernels, enable_step_cache
from processors.step_cache import check_step_cache, computed_blocks
from tests.fork.test_hidream_steps import HEIGHT, WIDTH, arguments
from tests.hidream_adapters import add_adapter
from tests.tiny_hidream import LAYERS, SINGLE_LAYERS, make_components, make_transformer

STEPS, BLOCKS = 8, LAYERS + SINGLE_LAYERS
EXACT = {
    "first block": FirstBlockCacheConfig(threshold=0.0),
    "taylorseer": TaylorSeerCacheConfig(cache_interval=1, use_lite_mode=True),
    "magcache": MagCacheConfig(threshold=0.0, num_inference_steps=STEPS, mag_ratios=[1.1] * STEPS),
}
# The random weights of the tiny model are large, and so is what changes from step to step.
FIRST_BLOCK, TAYLORSEER = ("first_block", 1.0), ("taylorseer", 3)
FULL = {"first_block": 6, "taylorseer": 5}  # of the eight steps of `edit`; of TaylorSeer 0, 1, 2, 4 and 7


@pytest.fixture
def pipe() -> Iterator[HiDreamImageEditingPipeline]:
    made = HiDreamImageEditingPipeline(**make_components())
    made.set_progress_bar_config(disable=True)
    yield made
    assert not states_of(made.transformer)


def states_of(transformer: Any) -> list[Any]:
    """What the cache hooks of a transformer remember."""
    hooks = [
        hook
        for module in transformer.modules()
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values()
    ]
    managers = [hook.state_manager for hook in hooks if hasattr(hook, "state_manager")]
    return [state for manager in managers for state in (*manager._state_cache, manager._context) if state is not None]


def edit(pipe: Any, size: tuple[int, int] = (80, 48), seed: int = 0, **options: Any) -> torch.Tensor:
    options = {"num_inference_steps": STEPS, "max_sequence_length": 16, "output_type": "latent"} | options
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (*size, 3), generator=generator).to(torch.uint8)
    return pipe("make it blue", image=Image.fromarray(pixels.numpy()), generator=generator, **options).images


@pytest.mark.parametrize("name", EXACT)
def test_a_cache_that_leaves_no_block_out_changes_nothing(pipe: Any, name: str) -> None:
    refiner = make_transformer(seed=7)
    options = {"refiner": refiner, "refine_strength": 0.5}
    expected = edit(pipe, **options)
    for model in (pipe.transformer, refiner):
        model.enable_cache(EXACT[name])
    assert torch.equal(edit(pipe, **options), expected)
    assert not states_of(refiner)
    for model in (pipe.transformer, refiner):
        model.disable_cache()
    assert torch.equal(edit(pipe, **options), expected)


@pytest.mark.parametrize("cache", [FIRST_BLOCK, TAYLORSEER], ids=str)
def test_pictures_and_sizes_after_one_another_are_those_alone(pipe: Any, cache: tuple[str, float]) -> None:
    calls = ({}, {"seed": 1}, {"size": (48, 64)}, {"guidance_scale": 1.0}, {})
    plain = edit(pipe)
    alone = []
    for call in calls:
        enable_step_cache(pipe, *cache)
        alone.append(edit(pipe, **call))
        assert not states_of(pipe.transformer)
        disable_step_cache(pipe)
    enable_step_cache(pipe, *cache)
    assert all(torch.equal(edit(pipe, **call), expected) for call, expected in zip(calls, alone, strict=True))
    assert not torch.equal(alone[0], plain)
    disable_step_cache(pipe)
    assert torch.equal(edit(pipe), plain)


@torch.no_grad()
def test_what_is_left_out_is_what_it_was_or_is_extrapolated() -> None:
    transformer = make_transformer()
    calls = [arguments(transformer) | {"timesteps": torch.tensor([time, time])} for time in (900, 800, 700, 600)]
    seen: list[tuple[torch.Tensor, ...]] = []

    def keep(_: Any, inputs: tuple[torch.Tensor, ...], outputs: Any) -> None:
        seen.append((*inputs, outputs[0] if isinstance(outputs, tuple) else outputs))

    watched = [transformer.double_stream_blocks[0].block, transformer.final_layer]
    handles = [module.register_forward_hook(keep) for module in watched]
    plain = [transformer(**call)[0] for call in calls]
    for handle in handles:
        handle.remove()
    first, last = [blocks for (blocks,) in seen[::2]], seen[1::2]

    transformer.enable_cache(FirstBlockCacheConfig(threshold=100.0))
    with transformer.cache_context("edit"):
        found = [transformer(**call)[0] for call in calls[:2]]
    transformer.disable_cache()
    tokens = first[1] + (last[0][0] - first[0])
    expected = transformer.unpatchify(
        transformer.final_layer(tokens, last[1][1]), [(HEIGHT // 2, WIDTH // 2)] * 2, False
    )
    assert torch.equal(found[0], plain[0]) and torch.allclose(found[1], expected, atol=1e-5)

    enable_step_cache(transformer, "taylorseer", 5)
    with transformer.cache_context("edit"):
        found = [transformer(**call)[0] for call in calls]
    assert all(map(torch.equal, found[:3], plain[:3]))
    assert torch.allclose(found[3], 2 * plain[2] - plain[1], atol=1e-5)


@pytest.mark.parametrize("cache", [FIRST_BLOCK, TAYLORSEER], ids=str)
def test_blocks_are_left_out(pipe: Any, cache: tuple[str, float]) -> None:
    enable_step_cache(pipe, *cache)
    edit(pipe)
    first = STEPS if cache is FIRST_BLOCK else FULL[cache[0]]
    assert computed_blocks(pipe.transformer) == [first] + [FULL[cache[0]]] * (BLOCKS - 1)


class Waits(TorchDispatchMode):
    """Counts the values that the host asks a device for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("cache", "waits"), [(FIRST_BLOCK, 2), (TAYLORSEER, 0)], ids=str)
@torch.no_grad()
def test_first_block_waits_once_a_step(cache: tuple[str, float], waits: int) -> None:
    transformer = make_transformer()
    enable_fused_kernels(transformer)
    enable_step_cache(transformer, *cache)
    with Waits() as found, transformer.cache_context("edit"):
        for _ in range(3):  # in the first there is nothing to compare
            transformer(**arguments(transformer))
    assert found.count == waits


@pytest.mark.parametrize("cache", [FIRST_BLOCK, TAYLORSEER], ids=str)
def test_fused_kernels_and_a_cache_switched_on_in_any_order(pipe: Any, cache: tuple[str, float]) -> None:
    enable_step_cache(pipe, *cache)
    expected = edit(pipe)
    enable_fused_kernels(pipe)  # which change nothing off the NPU
    assert torch.equal(edit(pipe), expected)
    disable_step_cache(pipe)
    enable_step_cache(pipe, *cache)
    assert torch.equal(edit(pipe), expected)


@pytest.mark.parametrize("cache", [FIRST_BLOCK, TAYLORSEER], ids=str)
def test_what_refines_has_a_state_of_its_own(pipe: Any, cache: tuple[str, float]) -> None:
    """With a second transformer, and with the same one without its adapter, which must be the same."""
    options = {"refine_strength": 0.5, "target_prompt": "a circle"}
    refiner = make_transformer()
    add_adapter(pipe.transformer)
    for model in (pipe.transformer, refiner):
        enable_step_cache(model, *cache)
    expected = edit(pipe, refiner=refiner, **options)
    full = [computed_blocks(model)[-1] for model in (pipe.transformer, refiner)]
    assert all(0 < count <= STEPS // 2 for count in full) and sum(full) < STEPS
    assert torch.equal(edit(pipe, **options), expected)
    assert computed_blocks(pipe.transformer)[-1] == 2 * full[0] + full[1]


def stop(pipe: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    if step == 4:
        raise KeyboardInterrupt
    return tensors


def interrupt(pipe: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._interrupt = step >= 4
    return tensors


@pytest.mark.parametrize("callback", [stop, interrupt])
@pytest.mark.parametrize("cache", [FIRST_BLOCK, TAYLORSEER], ids=str)
def test_a_call_that_ends_early_leaves_nothing(
    pipe: Any, cache: tuple[str, float], callback: Callable[..., Any]
) -> None:
    refiner = make_transformer(seed=7)
    for model in (pipe.transformer, refiner):
        enable_step_cache(model, *cache)
    options = {"refiner": refiner, "refine_strength": 0.6}
    expected = edit(pipe, **options)
    with suppress(KeyboardInterrupt):
        edit(pipe, callback_on_step_end=callback, **options)
    assert not states_of(pipe.transformer)
    assert not states_of(refiner)
    assert torch.equal(edit(pipe, **options), expected)


def end_guidance(pipe: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    if step != 4:
        return {}
    return {name: tensor[..., -1:, :, :] if tensor.dim() == 4 else tensor[-1:] for name, tensor in tensors.items()}


@pytest.mark.parametrize("cache", [FIRST_BLOCK, TAYLORSEER], ids=str)
def test_steps_start_anew_where_the_branches_are_others(pipe: Any, cache: tuple[str, float]) -> None:
    names = ["prompt_embeds_t5", "prompt_embeds_llama3", "pooled_prompt_embeds"]
    options = {"callback_on_step_end": end_guidance, "callback_on_step_end_tensor_inputs": names}
    plain = edit(pipe, **options)
    enable_step_cache(pipe, *cache)
    found = edit(pipe, **options)
    assert found.shape == plain.shape and not torch.equal(found, plain)
    assert computed_blocks(pipe.transformer)[-1] < STEPS


def test_drawing_has_a_cache_too() -> None:
    pipe = HiDreamImagePipeline(**make_components(scheduler="euler"))
    pipe.default_sample_size = 8  # of latents, to whose number of pixels drawings are scaled
    pipe.set_progress_bar_config(disable=True)

    def draw(seed: int = 0, **options: Any) -> torch.Tensor:
        options = {"num_inference_steps": STEPS, "max_sequence_length": 16, "output_type": "latent"} | options
        generator = torch.Generator().manual_seed(seed)
        return pipe("a blue circle", height=64, width=48, generator=generator, **options).images

    plain = draw()
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.9))  # as diffusers' documents do
    cached = draw()
    assert not torch.equal(cached, plain)
    draw(seed=1)
    assert torch.equal(draw(), cached)
    with pytest.raises(KeyboardInterrupt):
        draw(callback_on_step_end=stop)
    assert not states_of(pipe.transformer)


def test_what_does_not_serve_is_refused(pipe: Any) -> None:
    with pytest.raises(ValueError, match="FasterCacheConfig does not serve HiDream"):
        pipe.transformer.enable_cache(FasterCacheConfig(current_timestep_callback=lambda: 1))
    for name, value, message in (
        ("second_block", None, "there is no step cache 'second_block': take first_block or taylorseer"),
        ("first_block", 0.0, "above 0 and at most 1, not 0"),
        ("first_block", 1.5, "not 1.5"),
        ("first_block", float("nan"), "not nan"),
        ("taylorseer", 1, "a whole number from 2 to 20, not 1"),
        ("taylorseer", 2.5, "not 2.5"),
    ):
        with pytest.raises(ValueError, match=message):
            check_step_cache(name, value)
        with pytest.raises(ValueError, match=message):
            enable_step_cache(pipe, name, value)
    assert enable_step_cache(pipe, "taylorseer") == {"transformer": "taylorseer:3"}
    with pytest.raises(ValueError, match="the transformer has a step cache already"):
        enable_step_cache(pipe, "first_block")
    with pytest.raises(ValueError, match="AutoencoderKL has no HiDreamImageTransformer2DModel"):
        enable_step_cache(pipe.vae, "first_block")


def test_a_pipeline_without_a_cache_gets_no_hooks(pipe: Any) -> None:
    edit(pipe)
    assert not any(hasattr(module, "_diffusers_hook") for module in pipe.transformer.modules())
