"""Presets on the CPU: what is reported is what is there, and `disable` leaves what there was, to the bit."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, StableDiffusionXLInpaintPipeline
from peft import LoraConfig
from torch import nn

from processors import PRESETS, disable, enable, enable_flash_attention, enable_token_merging
from processors.presets import switches, weights
from tests.preset_state import IS_ON, assert_all_off, assert_reported
from tests.tiny_models import tiny_unet
from tests.tiny_pipelines import make_pipeline


class Plain(nn.Module):
    """No attention, no VAE, no blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return y


@pytest.fixture
def plain() -> Plain:
    torch.manual_seed(0)
    return Plain().eval().requires_grad_(False)


def draw(pipe: StableDiffusionPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size = {"height": 64, "width": 64, "num_inference_steps": 3}
    images: torch.Tensor = pipe("a cat", generator=generator, output_type="pt", **size).images
    return images


def state(pipe: Any) -> dict[str, torch.Tensor]:
    return {
        f"{n}.{k}": v.clone()
        for n in ("unet", "vae", "text_encoder")
        for k, v in getattr(pipe, n).state_dict().items()
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_a_report_on_a_pipeline_is_what_is_there(tiny_sd: StableDiffusionPipeline, preset: str) -> None:
    before, weights = draw(tiny_sd), state(tiny_sd)
    report = enable(tiny_sd, preset)
    assert_reported(report, preset, tiny_sd)
    if preset in ("speed", "memory"):  # the others compile for as long, and no other graph
        draw(tiny_sd)
    disable(tiny_sd)
    assert_all_off(tiny_sd)
    after = state(tiny_sd)
    assert weights.keys() == after.keys() and all(torch.equal(weights[key], after[key]) for key in weights)
    assert torch.equal(draw(tiny_sd), before)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_report_on_a_plain_module_is_what_is_there(plain: Plain, preset: str) -> None:
    x = torch.linspace(-1, 1, 128).view(2, 64)
    before = plain(x)
    report = enable(plain, preset)
    assert_reported(report, preset, plain)
    torch.testing.assert_close(plain(x), before)
    disable(plain)
    assert_all_off(plain)
    assert torch.equal(plain(x), before)


def test_a_model_that_trains_has_its_gradients_checkpointed(tiny_sd: StableDiffusionPipeline) -> None:
    unet = tiny_sd.unet.train().requires_grad_(True)
    report = enable(unet, "memory")
    assert report["gradient_checkpointing"].status == "applied" and unet.is_gradient_checkpointing
    assert report["streaming"] == ("unsupported", "the CPU computes in host memory, where weights are anyway")
    disable(unet)
    assert not unet.is_gradient_checkpointing


def test_graphs_and_quantisation_are_not_for_training(plain: Plain) -> None:
    report = enable(plain.train().requires_grad_(True), "full")
    assert report["graphs"] == ("unsupported", "Plain is in training mode and wants gradients; eval() ends that")
    assert report["mixed_precision"].status == "unsupported"
    x = torch.zeros(2, 64)
    plain(x).sum().backward()
    assert all(parameter.grad is not None for parameter in plain.parameters())


def test_what_was_on_stays_on(tiny_sd: StableDiffusionPipeline) -> None:
    enable_flash_attention(tiny_sd, kernels=["sdpa"])
    enable_token_merging(tiny_sd, ratio=0.25)
    tiny_sd.vae.enable_slicing()
    tiny_sd.unet.set_cache_interval(2)
    expected = draw(tiny_sd)
    report = enable(tiny_sd, "full")
    for name in ("fused_kernels", "token_merging", "cache_interval", "vae_slicing"):
        assert report[name].status == "applied" and "on before" in report[name].reason
    disable(tiny_sd)
    assert all(IS_ON[name](tiny_sd) for name in ("fused_kernels", "token_merging", "cache_interval", "vae_slicing"))
    assert torch.equal(draw(tiny_sd), expected)


def test_a_preset_is_of_one_target_alone(tiny_sd: StableDiffusionPipeline) -> None:
    other = StableDiffusionImg2ImgPipeline(**tiny_sd.components)
    enable(tiny_sd.unet, "memory")
    for target in (tiny_sd, other, tiny_sd.unet.mid_block):
        with pytest.raises(ValueError, match="UNet2DConditionModel is under a preset already, and this .* shares it"):
            enable(target, "full")
    enable(tiny_sd.vae, "memory")
    disable(tiny_sd.unet)
    disable(tiny_sd.vae)
    enable(tiny_sd, "memory")
    with pytest.raises(ValueError, match="the AutoencoderKL of a StableDiffusionPipeline is under a preset already"):
        enable(StableDiffusionImg2ImgPipeline(**tiny_sd.components).vae)
    disable(tiny_sd)
    assert_all_off(tiny_sd)


def test_a_model_that_was_swapped_out_is_still_under_its_preset(tiny_sd: StableDiffusionPipeline) -> None:
    enable(tiny_sd, "memory")
    old, tiny_sd.unet = tiny_sd.unet, copy.deepcopy(tiny_sd.unet)
    with pytest.raises(ValueError, match="is under a preset already"):
        enable(old, "speed")
    disable(tiny_sd)
    enable(old, "speed")
    disable(old)


@pytest.mark.parametrize("switch", ["mixed_precision", "fused_kernels"])
def test_a_switch_that_fails_half_way_is_undone(
    tiny_sd: StableDiffusionPipeline, half: None, switch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = draw(tiny_sd)
    calls: list[int] = []

    def interrupted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call

    if switch == "mixed_precision":
        monkeypatch.setattr(weights.Cast, "apply", interrupted(weights.Cast.apply))
    else:
        monkeypatch.setattr(switches, "enable_fused_kernels", interrupted(switches.enable_fused_kernels))
    with pytest.raises(KeyboardInterrupt):
        enable(tiny_sd, "balanced")
    assert_all_off(tiny_sd)
    assert torch.equal(draw(tiny_sd), expected)


def test_another_preset_takes_the_place_of_the_first(tiny_sd: StableDiffusionPipeline) -> None:
    enable(tiny_sd, "memory")
    assert_reported(enable(tiny_sd, "speed"), "speed", tiny_sd)
    disable(tiny_sd)
    disable(tiny_sd)
    assert_all_off(tiny_sd)


def test_the_environment_is_read_when_a_preset_is_enabled(plain: Plain, monkeypatch: pytest.MonkeyPatch) -> None:
    assert enable(plain)["graphs"].status == "applied"
    monkeypatch.setenv("ASCEND_PRESET", "")
    assert enable(plain)["graphs"].status == "applied"
    monkeypatch.setenv("ASCEND_PRESET", "memory")
    assert enable(plain)["graphs"].status == "not asked for"
    monkeypatch.setenv("ASCEND_PRESET", "fast")
    with pytest.raises(
        ValueError, match="^ASCEND_PRESET 'fast' is not known: take one of speed, balanced, memory, full"
    ):
        enable(plain)


def test_what_is_no_preset_or_no_target_changes_nothing(tiny_sd: StableDiffusionPipeline) -> None:
    enable(tiny_sd, "memory")
    with pytest.raises(ValueError, match="preset 'Speed' is not known"):
        enable(tiny_sd, "Speed")
    assert IS_ON["vae_tiling"](tiny_sd)
    with pytest.raises(TypeError, match="expected a pipeline of diffusers or a model, got str"):
        enable("a pipeline", "speed")  # type: ignore[arg-type]


def test_a_switch_that_fails_takes_back_the_others(
    tiny_sd: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(tile: bool = True) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(tiny_sd.vae, "enable_tiling", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        enable(tiny_sd, "full")
    assert_all_off(tiny_sd)


def test_a_preset_does_not_keep_its_target_alive(plain: Plain) -> None:
    model = Plain().eval()
    enable(model, "memory")
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, whose best dtype is another than float32."""
    monkeypatch.setattr("processors.presets.weights.best_dtype", lambda device: torch.bfloat16)


def test_the_models_that_were_changed_are_restored_whatever_became_of_the_pipeline(
    tiny_sd: StableDiffusionPipeline, half: None
) -> None:
    first, second = tiny_sd.unet, tiny_unet().eval()
    weights = [{key: value.clone() for key, value in unet.state_dict().items()} for unet in (first, second)]
    enable(tiny_sd, "memory")
    assert first.dtype == torch.bfloat16
    tiny_sd.unet, tiny_sd.vae = second, None
    disable(tiny_sd)
    for unet, before in zip((first, second), weights, strict=True):
        assert_all_off(unet)
        assert all(torch.equal(before[key], value) for key, value in unet.state_dict().items())


def test_weights_are_restored_beneath_adapters_and_beside_new_ones(
    tiny_sd: StableDiffusionPipeline, half: None
) -> None:
    tiny_sd.unet.requires_grad_(False)  # as an adapter leaves it, and torch.matmul rounds accordingly
    expected = draw(tiny_sd)
    enable(tiny_sd, "memory")
    tiny_sd.unet.fuse_qkv_projections()
    disable(tiny_sd)
    assert {parameter.dtype for parameter in tiny_sd.unet.parameters()} == {torch.float32}
    tiny_sd.unet.unfuse_qkv_projections()
    enable(tiny_sd, "memory")
    tiny_sd.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "late")
    disable(tiny_sd)
    assert {parameter.dtype for parameter in tiny_sd.unet.parameters()} == {torch.float32}
    tiny_sd.unet.delete_adapters("late")
    assert torch.equal(draw(tiny_sd), expected)


def test_buffers_are_restored_after_the_model_moved(plain: Plain, half: None) -> None:
    """Which gives it other ones, where a parameter stays itself."""
    plain.register_buffer("scale", torch.tensor([1.2345678]))
    enable(plain, "memory")
    plain.double().bfloat16()
    disable(plain)
    assert plain.scale.item() == torch.tensor(1.2345678).item()


def test_weights_that_were_changed_since_stay_changed(
    plain: Plain, half: None, caplog: pytest.LogCaptureFixture
) -> None:
    bias = plain.layers[2].bias.clone()
    enable(plain, "memory")
    plain.layers[0].weight.data.fill_(0.5)
    disable(plain)
    assert plain.layers[0].weight.eq(0.5).all() and plain.layers[0].weight.dtype == torch.float32
    assert torch.equal(plain.layers[2].bias, bias)
    assert "1 weights were changed since the preset was enabled" in caplog.text


def test_a_copy_of_a_model_under_autocast_computes_on_its_own(plain: Plain, half: None) -> None:
    enable(plain.train().requires_grad_(True), "balanced")
    average = copy.deepcopy(plain)
    x = torch.ones(2, 64)
    expected = average(x)
    assert expected.dtype == torch.bfloat16
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert torch.equal(average(x), expected)
    disable(plain)
    assert plain(x).dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def test_what_is_kept_in_float32_stays(half: None) -> None:
    model = Plain().eval()
    model._keep_in_fp32_modules = ["2"]
    model.register_buffer("frequencies", torch.ones(3), persistent=False)
    enable(model, "memory")
    assert model.layers[0].weight.dtype == torch.bfloat16
    assert model.layers[2].weight.dtype == model.frequencies.dtype == torch.float32


def test_a_pipeline_with_a_model_that_trains_keeps_its_weights(tiny_sd: StableDiffusionPipeline, half: None) -> None:
    tiny_sd.unet.train()
    report = enable(tiny_sd, "full")
    assert report["gradient_checkpointing"].status == "applied" and tiny_sd.unet.is_gradient_checkpointing
    for name in ("mixed_precision", "graphs"):
        assert report[name] == ("unsupported", "unet is in training mode and wants gradients; eval() ends that")
    disable(tiny_sd)
    assert not tiny_sd.unet.is_gradient_checkpointing


def test_a_pipeline_that_reads_no_interval_has_no_cache() -> None:
    pipe = make_pipeline("SDXL")
    parts = pipe.components | {"image_encoder": None, "feature_extractor": None}
    other = StableDiffusionXLInpaintPipeline(**parts)
    assert enable(other, "speed")["cache_interval"] == ("unsupported", "StableDiffusionXLInpaintPipeline has no cache")
    disable(other)


def test_a_report_reads_as_a_table(plain: Plain) -> None:
    lines = str(enable(plain, "memory")).splitlines()
    assert "token_merging           not asked for" in lines
    assert "vae_tiling              unsupported: there is no VAE" in lines
