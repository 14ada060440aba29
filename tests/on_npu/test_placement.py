"""Where a pipeline's components are, after whatever was done to it before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from ascend import placement
from ascend.graphs.compile import compile_pipeline
from ascend.placement import place_pipeline

IN_TURN = "components move to npu:0 in turn: 0.0 GiB do not fit at once"


def devices(pipe: StableDiffusionPipeline) -> set[str]:
    return {parameter.device.type for name in ("unet", "vae") for parameter in getattr(pipe, name).parameters()}


def draw(pipe: StableDiffusionPipeline) -> torch.Tensor:
    size = {"height": 64, "width": 64, "num_inference_steps": 1, "output_type": "pt"}
    return pipe("a cat", generator=torch.Generator().manual_seed(0), **size).images


def test_a_pipeline_is_placed_anew_whatever_was_done_before(
    npu: torch.device, tiny_sd: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = torch.device("cpu")
    expected = draw(tiny_sd)
    for device, fits, report, resting in (
        (npu, False, IN_TURN, {"cpu"}),
        (npu, False, IN_TURN, {"cpu"}),
        (npu, True, "all components are on npu:0", {"npu"}),
        (npu, False, IN_TURN, {"cpu"}),
        (host, True, "all components are on cpu", {"cpu"}),
    ):
        monkeypatch.setattr(placement, "fits", lambda *_, fits=fits: fits)
        assert place_pipeline(tiny_sd, device)[0] == report
        assert devices(tiny_sd) == resting
        picture = draw(tiny_sd)
        assert picture.device.type == device.type
        torch.testing.assert_close(picture.cpu(), expected, atol=0.02, rtol=0)  # 310P multiplies float32 as float16


def test_a_compiled_pipeline_is_not_moved_away_from_its_graphs(
    npu: torch.device, tiny_sd: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny_sd.to(npu, torch.float16)
    compile_pipeline(tiny_sd, tmp_path)
    assert place_pipeline(tiny_sd, npu)[0] == "all components are on npu:0"
    monkeypatch.setattr(placement, "fits", lambda *_: False)
    with pytest.raises(
        RuntimeError, match="those of the .* cannot move, as it is compiled or shared: place the pipeline"
    ):
        place_pipeline(tiny_sd, npu)
    assert devices(tiny_sd) == {"npu"}
