"""Times and quality are joined by what was drawn, and only where both drew it with the same steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.schedules import pareto

BY_SCALE = {"1.5": 7, "4": 10}  # full steps


def drawn(full_steps: int, psnr: float) -> dict[str, Any]:
    return {"full_steps": full_steps, "shallow_steps": 50 - full_steps, "psnr": psnr, "psnr_worst_tenth": psnr - 8}


def timed(config: str, full_steps: int, seconds: list[float], **setting: float) -> dict[str, Any]:
    return {"config": config, "full_steps": full_steps, "shallow_steps": 50 - full_steps, "seconds": seconds} | setting


@pytest.fixture
def quality() -> dict[str, Any]:
    return {
        "results": {
            scale: {
                "all steps": drawn(50, 100),
                "fast balanced": drawn(full, 50 - float(scale)),
                "DeepCache 3": drawn(17, 40),
                "unipc 20 steps": drawn(20, 41),
            }
            for scale, full in BY_SCALE.items()
        }
    }


@pytest.fixture
def times() -> dict[str, Any]:
    rows = [timed("none", 50, [100, 200]), timed("DeepCache", 17, [50, 80], interval=3)]
    rows += [timed("DeepCache", 7, [20, 40], interval=8), timed("FA", 50, [99, 198])]  # of which no pictures are
    rows += [timed("fast balanced + dynamo", full, [full, 2 * full], guidance_scale=float(scale))
             for scale, full in BY_SCALE.items()]  # fmt: skip
    settings = {"steps": 50, "device": "cpu", "dtype": "torch.bfloat16"}
    return {
        "settings": settings,
        "results": {str(number) if number else "none": row for number, row in enumerate(rows)},
    }


def test_each_panel_has_the_ways_that_both_files_have(quality: dict[str, Any], times: dict[str, Any]) -> None:
    panels = pareto.join(quality, times)
    assert [*panels] == ["1.5", "4"]
    for scale, points in panels.items():
        assert {point.name for point in points} == {"DeepCache 3", "fast balanced"}
        found = {point.name: point for point in points}
        assert found["DeepCache 3"].time == pytest.approx(0.45)  # of rounds with 0.5 and 0.4
        assert found["fast balanced"].time == pytest.approx(BY_SCALE[scale] / 100)
        assert found["fast balanced"].psnr == 50 - float(scale)


def test_other_steps_are_not_joined(quality: dict[str, Any], times: dict[str, Any]) -> None:
    quality["results"]["4"]["fast balanced"]["full_steps"] = 9
    with pytest.raises(pareto.UserError, match="fast balanced, guidance 4: --times has 10 full"):
        pareto.join(quality, times)


def test_the_picture_is_written_or_what_is_wrong_is_said(
    quality: dict[str, Any], times: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "compare.json", tmp_path / "benchmark.json"]
    picture = tmp_path / "new" / "pareto.png"
    options = ["--quality", str(files[0]), "--times", str(files[1]), "--output", str(picture)]
    for path, content in zip(files, (quality, times), strict=True):
        path.write_text(json.dumps(content))
    pareto.main(options)
    assert picture.stat().st_size > 1000
    assert "DeepCache 3 (DeepCache)" in capsys.readouterr().out
    none_in_common: dict[str, Any] = {"results": {}}
    no_number = {"results": {"4": {"fast balanced": drawn(10, 40) | {"psnr": "x"}}}}
    for wrong, said in (
        ({}, "of this"),
        (no_number, "PSNR"),
        (none_in_common, "in common"),
        ({"results": {"4": 3}}, "of this"),
    ):
        files[0].write_text(json.dumps(wrong))
        with pytest.raises(SystemExit):
            pareto.main(options)
        assert said in capsys.readouterr().err
    files[0].unlink()
    with pytest.raises(SystemExit):
        pareto.main(options)
    assert "there is no such file" in capsys.readouterr().err
