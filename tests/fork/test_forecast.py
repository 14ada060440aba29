"""Forecasts in the place of UNet calls, in the fork: `Forecast`, and the pipelines' arguments for them."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.unets.deep_cache import get_full_steps, plan_between
from diffusers.models.unets.forecast import Forecast, NoiseForecast
from diffusers.models.unets.forecast_solver import signal_and_noise

STEPS = 12
FAST: dict[str, Any] = {"cache_schedule": [0, 2, 5, 8, 10], "cache_forecast": True}


def draw(pipe: StableDiffusionPipeline, prompt: str | list[str] = "a red circle", **kwargs: Any) -> torch.Tensor:
    options = {"num_inference_steps": STEPS, "height": 64, "width": 64, "output_type": "latent"} | kwargs
    options.setdefault("generator", torch.Generator().manual_seed(0))
    return pipe(prompt, **options).images


def calls_of(pipe: StableDiffusionPipeline) -> list[tuple[int, bool]]:
    """A list that grows with each call of the UNet by its rows and whether it runs all layers."""
    calls: list[tuple[int, bool]] = []
    pipe.unet.mid_block.register_forward_hook(lambda *_: calls.append((calls.pop()[0], True)))
    pipe.unet.register_forward_pre_hook(lambda _, arguments: calls.append((len(arguments[0]), False)))
    return calls


def ddim(pipe: StableDiffusionPipeline, name: str = "DDIMScheduler", **options: Any) -> StableDiffusionPipeline:
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
    return pipe


@pytest.mark.parametrize("asked_for", [["latents"], []])
def test_a_cache_that_callbacks_under_inference_mode_empty_says_so(
    tiny_sd: StableDiffusionPipeline, asked_for: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    calls = calls_of(ddim(tiny_sd))
    options = FAST | {"callback_on_step_end": lambda *_: {}, "callback_on_step_end_tensor_inputs": asked_for}
    draw(tiny_sd, **options)
    full_steps = len([call for call in calls if call[1]])
    assert "inference_mode" not in caplog.text
    calls.clear()
    with torch.inference_mode():
        draw(tiny_sd, **options)
    assert caplog.text.count("torch.inference_mode") == len(asked_for)
    assert len([call for call in calls if call[1]]) == (STEPS if asked_for else full_steps)


def test_a_line_is_followed_where_it_led_before() -> None:
    forecast = Forecast()
    value = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    slope = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    for time in (900.0, 850.0):
        forecast.push(time, value + slope * time)
        assert torch.equal(forecast.at(700.0), value + slope * time)  # two values say nothing of the third
    forecast.push(750.0, value + slope * 750)
    torch.testing.assert_close(forecast.at(640.0), value + slope * 640)


def test_a_line_is_damped_by_how_far_it_was_off_row_by_row() -> None:
    """The third value of the rows is as forecast, half of it, the opposite, and more than the most: 1, 0.5, 0, 1.5."""
    forecast = Forecast()
    forecast.push(3.0, torch.zeros(4, 5))
    forecast.push(2.0, torch.ones(4, 5))
    forecast.push(1.0, 1 + torch.tensor([1.0, 0.5, -1.0, 4.0])[:, None].expand(4, 5))
    moved = forecast.at(0.0) - torch.tensor([2.0, 1.5, 0.0, 5.0])[:, None]
    torch.testing.assert_close(
        moved, (torch.tensor([1, 0.5, 0, 1.5]) * torch.tensor([1, 0.5, -1, 4]))[:, None].expand(4, 5)
    )


def test_a_flat_quantity_stays_flat_and_float16_does_not_overflow() -> None:
    forecast = Forecast()
    for time in (3.0, 2.0, 1.0):
        forecast.push(time, torch.full((2, 8), 5.0))
    assert torch.equal(forecast.at(0.0), torch.full((2, 8), 5.0))
    forecast = Forecast()
    for time in (3.0, 2.0, 1.0):
        forecast.push(time, torch.full((1, 1 << 17), 20 * time).half())  # the sum of squares is 5e7
    assert forecast.at(0.0).dtype == torch.float16
    assert forecast.at(0.0).abs().max() < 0.1


@pytest.mark.parametrize("guidance_scale", [None, 4.0])
def test_velocities_are_forecast_as_the_noise_that_they_stand_for(guidance_scale: float | None) -> None:
    levels = {time: (math.cos(time), math.sin(time)) for time in (1.5, 1.2, 0.9, 0.7, 0.5)}
    of_noise, of_velocity = NoiseForecast(guidance_scale), NoiseForecast(guidance_scale, levels)
    branches = 1 if guidance_scale is None else 2

    def both(time: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(int(time * 10))
        sample, noise = torch.randn(2, branches, 4, 8, 8, generator=generator)
        signal, level = levels[time]
        return sample, noise, (noise - level * sample) / signal

    def alike(time: float, noise: torch.Tensor, velocity: torch.Tensor, sample: torch.Tensor) -> None:
        signal, level = levels[time]
        torch.testing.assert_close(signal * velocity + level * sample, noise, rtol=1e-5, atol=1e-5)

    for time in (1.5, 1.2, 0.9):
        sample, noise, velocity = both(time)
        of_noise.full(time, sample, noise)
        of_velocity.full(time, sample, velocity)
    sample, noise, velocity = both(0.7)
    alike(0.7, of_noise.skip(0.7, sample), of_velocity.skip(0.7, sample), sample)
    one = of_noise.shallow(0.7, sample, noise[-1:]), of_velocity.shallow(0.7, sample, velocity[-1:])
    alike(0.7, *one, sample)
    sample, _, _ = both(0.5)
    alike(0.5, of_noise.skip(0.5, sample), of_velocity.skip(0.5, sample), sample)


def test_signal_and_noise_of_a_timestep(tiny_sd: StableDiffusionPipeline) -> None:
    products = tiny_sd.scheduler.alphas_cumprod.double()
    signal, noise = signal_and_noise(tiny_sd.scheduler, [500])[500]
    assert signal == pytest.approx(products[500].item() ** 0.5)
    assert signal**2 + noise**2 == pytest.approx(1)
    between = signal_and_noise(tiny_sd.scheduler, [500.5])[500.5][0]
    assert products[501].item() ** 0.5 < between < signal
    tiny_sd.scheduler.alphas_cumprod = torch.zeros(1000)  # as the last one of zero terminal SNR is
    assert signal_and_noise(tiny_sd.scheduler, [999])[999] == (0.0, 1.0)


def test_the_early_schedule() -> None:
    assert sorted(get_full_steps(50, cache_schedule="early")) == [0, 2, 4, 7, 11, 16, 22, 28, 35, 41, 45, 48]
    assert sorted(get_full_steps(50, cache_schedule="early", cache_full_steps=2)) == [0, 48]
    assert get_full_steps(50, cache_schedule="early", cache_full_steps=1) == {0}
    assert len(get_full_steps(4, cache_schedule="early", cache_full_steps=9)) <= 4
    with pytest.raises(ValueError, match="`cache_full_steps` must be at least 1, but is 0"):
        get_full_steps(50, cache_schedule="early", cache_full_steps=0)


def test_what_runs_between_full_steps() -> None:
    full = frozenset({0, 2, 7})
    assert plan_between(9, full) == {1, 3, 4, 5, 6, 8}
    assert plan_between(9, full, "skip") == frozenset()
    assert plan_between(9, full, "mixed") == {1, 3, 6, 8}
    assert plan_between(9, full, [4]) == {4}
    with pytest.raises(ValueError, match=r"names steps \[2, 9\]"):
        plan_between(9, full, [4, 2, 9])
    with pytest.raises(ValueError, match="must be 'shallow', 'mixed', 'skip'"):
        plan_between(9, full, "none")


@pytest.mark.parametrize(
    ("between", "shallow"), [("shallow", STEPS - 5), ("mixed", 5), ("skip", 0), ([3], 1)], ids=str
)
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_shallow_steps_run_one_branch_and_skipped_steps_nothing(
    tiny_sd: StableDiffusionPipeline, between: str | list[int], shallow: int, guidance_scale: float
) -> None:
    rows = 4 if guidance_scale > 1 else 2
    calls = calls_of(ddim(tiny_sd))
    draw(tiny_sd, num_images_per_prompt=2, guidance_scale=guidance_scale, cache_between=between, **FAST)
    assert calls.count((rows, True)) == 5
    assert calls.count((2, False)) == shallow == len(calls) - 5


def test_a_picture_does_not_depend_on_those_beside_it(tiny_sd: StableDiffusionPipeline) -> None:
    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    options = {"cache_between": "mixed", **FAST}
    pair = draw(ddim(tiny_sd), ["a cat", "a red circle"], generator=generators(1, 2), **options)
    for row, (prompt, seed) in enumerate([("a cat", 1), ("a red circle", 2)]):
        alone = draw(tiny_sd, [prompt], generator=generators(seed), **options)
        torch.testing.assert_close(pair[row], alone[0], rtol=1e-4, atol=1e-4)


def test_a_constant_unet_is_forecast_exactly(tiny_sd: StableDiffusionPipeline) -> None:
    """Whatever is left out: with the schedulers that take forecasts, pictures are those of all steps."""
    with torch.no_grad():
        tiny_sd.unet.conv_out.weight.zero_()
        tiny_sd.unet.conv_out.bias.copy_(torch.tensor([0.1, -0.2, 0.3, 0.05]))
    for name, options in {
        "DDIMScheduler": {},
        "EulerDiscreteScheduler": {},
        "PNDMScheduler": {"skip_prk_steps": True},
    }.items():
        ddim(tiny_sd, name, clip_sample=False, **options)
        plain = draw(tiny_sd)
        for between in ("shallow", "mixed", "skip"):
            torch.testing.assert_close(draw(tiny_sd, cache_between=between, **FAST), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler"])
def test_nearly_all_steps_give_nearly_the_same_picture(
    tiny_sd: StableDiffusionPipeline, name: str, prediction_type: str
) -> None:
    """One step in the middle is forecast; a UNet of random weights has much less of a line than a trained one."""
    options = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    ddim(tiny_sd, name, prediction_type=prediction_type, clip_sample=False, **options)
    plain = draw(tiny_sd, num_inference_steps=30)
    forecast = draw(
        tiny_sd,
        num_inference_steps=30,
        cache_schedule=[step for step in range(30) if step != 20],
        cache_forecast=True,
        cache_between="skip",
    )
    error = (forecast - plain).square().mean().sqrt() / plain.square().mean().sqrt()
    assert 0 < error < 0.05


def test_a_callback_that_changes_latents_starts_anew(tiny_sd: StableDiffusionPipeline) -> None:
    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if step == 6:
            tensors["latents"] = tensors["latents"] * 1.1
        return tensors

    calls = calls_of(ddim(tiny_sd))
    full = [0, 2, 4]
    options = {"cache_schedule": full, "cache_forecast": True, "cache_between": "skip"}
    draw(tiny_sd, callback_on_step_end=lambda pipe, step, time, tensors: tensors, **options)
    assert len(calls) == 3
    draw(tiny_sd, callback_on_step_end=change, **options)
    assert len(calls) == 3 + 4


def test_guidance_that_ends_starts_anew(tiny_sd: StableDiffusionPipeline) -> None:
    def end(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if step == 6:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"][-1:]
        return tensors

    calls = calls_of(ddim(tiny_sd))
    options = {"cache_schedule": [0, 2, 4], "cache_forecast": True, "cache_between": "mixed"}
    draw(
        tiny_sd,
        callback_on_step_end=end,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        **options,
    )
    assert calls.count((1, True)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cache_forecast": True}, "has no effect: all steps are full ones"),
        ({"cache_interval": 3, "cache_between": "skip"}, "needs `cache_forecast=True`"),
        ({"cache_between": "skip"}, "has no effect: all steps are full ones"),
        ({"cache_interval": 3, **FAST}, "`cache_interval=3` has no effect"),
        ({"eta": 0.5, **FAST}, "needs `eta=0`, not 0.5"),
    ],
)
def test_arguments_that_do_not_fit(tiny_sd: StableDiffusionPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(ddim(tiny_sd), **arguments)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("EulerAncestralDiscreteScheduler", {}, "not with EulerAncestral"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "solver without noise"),
        ("DDPMScheduler", {}, "not with DDPMScheduler"),
        ("DDIMScheduler", {"prediction_type": "sample"}, "not 'sample'"),
        ("PNDMScheduler", {"skip_prk_steps": False}, "skip_prk_steps=True"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timesteps of training"),
        (
            "DDIMScheduler",
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            "guidance would be lost",
        ),
    ],
)
def test_schedulers_that_take_no_forecast(
    tiny_sd: StableDiffusionPipeline, name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        draw(ddim(tiny_sd, name, **options), **FAST)
