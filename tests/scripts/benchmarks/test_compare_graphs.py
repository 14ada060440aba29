"""The comparison of graphs with eager pictures tells equal ones from others, and says which set of flags it is of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from scripts.benchmarks import compare_graphs


@pytest.fixture
def arguments(tiny_sd_dir: Path, tmp_path: Path) -> list[str]:
    few = ["--sizes", "64", "--seeds", "0", "1", "--steps", "2", "--device", "cpu", "--configs", "none", "FA + DC"]
    return ["--model_path", str(tiny_sd_dir), "--output_dir", str(tmp_path), *few]


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_pictures_are_compared(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    def compile_wrongly(pipe: StableDiffusionPipeline) -> None:
        pipe.vae.decoder.conv_out.weight.data.mul_(scale)

    monkeypatch.setattr(compare_graphs, "compile_pipeline", compile_wrongly)
    compare_graphs.main(arguments)
    report = json.loads((tmp_path / "graphs.json").read_text())
    assert set(report["psnr"]) == {"none", "FA + DC"}
    for psnr in report["psnr"].values():
        assert len(psnr) == 2
        assert all(value is None if scale == 1 else value < 50 for value in psnr)
