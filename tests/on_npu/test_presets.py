"""Presets on a chip: what is reported is on the object, pictures come of it, and `disable` restores to the bit.

"full", which compiles a graph for each kind of block, is slow:
python -m emulator run --soc Ascend310P3 -- python -m pytest -m slow tests/on_npu/test_presets.py
"""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from ascend import place_pipeline
from processors import PRESETS, disable, enable
from processors.models.components import components_of
from tests.ascend.streaming.test_stream import Transformer
from tests.preset_state import assert_all_off, assert_reported


def draw(pipe: StableDiffusionPipeline) -> torch.Tensor:
    size = {"height": 64, "width": 64, "num_inference_steps": 3}
    generator = torch.Generator().manual_seed(0)
    images: torch.Tensor = pipe("a cat", generator=generator, output_type="pt", **size).images
    return images.float().cpu()


def weights(pipe: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value.cpu()
        for name, model in components_of(pipe).items()
        for key, value in model.state_dict().items()
    }


# From host memory where a preset streams; another home would compile the same graphs once more.
@pytest.mark.parametrize(
    ("preset", "home"),
    [
        ("speed", "npu"),
        ("balanced", "npu"),
        ("memory", "npu"),
        ("memory", "cpu"),
        pytest.param("full", "cpu", marks=pytest.mark.slow),
    ],
)
def test_a_report_on_a_pipeline_is_what_is_there(
    npu: torch.device, small_sd: StableDiffusionPipeline, preset: str, home: str
) -> None:
    small_sd.to(npu)
    expected = draw(small_sd)
    small_sd.to(home)
    before = weights(small_sd)
    report = enable(small_sd, preset)
    assert_reported(report, preset, small_sd)
    for name in ("fused_kernels", "mixed_precision"):
        assert report[name].status == "applied"
    for name in PRESETS[preset] & {"quantized_weights", "streaming"}:
        assert report[name].status == "applied", report[name]
    picture = draw(small_sd)
    assert picture.isfinite().all() and (picture - expected).abs().mean() < 0.1  # of the same scene
    disable(small_sd)
    assert_all_off(small_sd)
    assert small_sd.device.type == home
    after = weights(small_sd)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(draw(small_sd.to(npu)), expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_report_on_a_plain_module_is_what_is_there(npu: torch.device, preset: str) -> None:
    torch.manual_seed(0)
    model = Transformer(blocks=3, width=128).eval().requires_grad_(False).to(npu)
    x = torch.linspace(-1, 1, 12).view(3, 4).to(npu)
    before = model(x)
    report = enable(model, preset)
    assert_reported(report, preset, model)
    dtype = next(model.parameters()).dtype
    torch.testing.assert_close(model(x.to(dtype)).float(), before, atol=0.05, rtol=0.05)  # float16, int8
    disable(model)
    assert_all_off(model)
    assert torch.equal(model(x), before)


def test_a_model_that_trains_computes_under_autocast(npu: torch.device) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)).train().to(npu)
    report = enable(model, "balanced")
    assert_reported(report, "balanced", model)
    assert report["mixed_precision"].status == "applied"
    model(torch.ones(2, 64, device=npu)).float().sum().backward()
    assert all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    disable(model)
    assert_all_off(model)


def test_a_pipeline_that_was_placed_since_stays_there(npu: torch.device, tiny_sd: StableDiffusionPipeline) -> None:
    enable(tiny_sd, "memory", npu)
    place_pipeline(tiny_sd, npu)
    disable(tiny_sd)
    models = components_of(tiny_sd).values()
    assert {parameter.device for model in models for parameter in model.parameters()} == {npu}
