"""A step's arithmetic, speed and operators are written for a model that draws."""

import json
from pathlib import Path

import pytest

from runners.unet_cost import GIGA, step_flops
from scripts.benchmarks import profile_step
from tests.tiny_models import tiny_unet


def test_a_profile_has_the_step_and_its_operators(
    tiny_sd_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profile_step, "PRODUCT", 256)
    options = ["--model", str(tiny_sd_dir), "--device", "cpu", "--flags", "FA", "--steps", "2", "--rounds", "1"]
    profile_step.main([*options, "--output_dir", str(tmp_path)])
    found = json.loads((tmp_path / "profile.json").read_text())
    config = tiny_unet().config
    summary = found["summary"]
    full = step_flops(config, config.sample_size, config.sample_size).full
    assert summary["gflops_of_a_step"] == pytest.approx(2 * full / GIGA)
    assert summary["gflops_per_second_of_a_step"] * summary["seconds_of_a_step"] == pytest.approx(2 * full / GIGA)
    operators = found["operators"]
    assert sum(row["share"] for row in operators.values()) == pytest.approx(1)
    assert operators["aten::mkldnn_convolution"]["calls"] > 10
    assert "aten::mkldnn_convolution" in capsys.readouterr().out


def test_one_step_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        profile_step.main(["--steps", "1"])
    assert "--steps 1" in capsys.readouterr().err
