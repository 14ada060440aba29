"""Schedules are found by their goals, and what is compared is drawn alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from runners.schedule_file import Schedule, read_schedules
from runners.schedulers import make_scheduler
from scripts.benchmarks.benchmark import SD21_BASE_UNET
from scripts.schedules import compare, find
from scripts.schedules.costs import Costs
from scripts.schedules.drawing import Distance, Drawing, Method, distance, draw

STEPS = 12


@pytest.fixture
def options(small_sd_dir: Path, tmp_path: Path) -> list[str]:
    """The small model draws two pictures with few steps."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    given = {"model_path": small_sd_dir, "prompts": prompts, "num_prompts": 2, "steps": STEPS, "device": "cpu"}
    return [str(word) for name, value in given.items() for word in (f"--{name}", value)]


def test_distance_is_in_decibels_of_single_pictures() -> None:
    reference = np.zeros((20, 2, 2, 3))
    pictures = reference + np.array([0.1] * 18 + [0.01, 1.0])[:, None, None, None]
    found = distance(pictures, reference)
    assert found.psnr == pytest.approx((18 * 20 + 40 + 0) / 20)
    assert found.worst_tenth == pytest.approx((0 + 20) / 2)
    assert distance(reference, reference) == Distance(100, 100)
    assert found.reaches(Distance(19, 9)) and not found.reaches(Distance(19, 11))


def test_a_way_of_drawing_leaves_the_pipeline_as_it_was(small_sd: StableDiffusionPipeline) -> None:
    drawing = Drawing(["a cat", "a dog", "a bird"], 3, STEPS, 4.0, batch_size=2)
    before = draw(small_sd, drawing, Method(), "before")
    scheduler, other = small_sd.scheduler, Method(ratio=0.5, scheduler="dpm++", steps=5)
    assert not np.allclose(draw(small_sd, drawing, other, "other"), before, atol=1e-2)
    assert small_sd.scheduler is scheduler
    assert np.array_equal(draw(small_sd, drawing, Method(), "after"), before)
    alone = draw(small_sd, drawing._replace(prompts=["a bird"], seed=5), Method(), "alone")
    np.testing.assert_allclose(alone[0], before[2], atol=1e-3)


def test_a_schedule_that_reaches_its_goal_is_written(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(find, "GOALS", {"turbo": Method({"cache_interval": 2})})
    output = tmp_path / "found" / "schedules.json"
    rows = ["--guidance_scales", "4", "--rows", "turbo", "--schedulers", "euler", "--margin", "-20"]
    find.main([*options, *rows, "--output", str(output)])
    [schedule] = read_schedules(output)
    assert schedule.scheduler == "EulerDiscreteScheduler"
    assert (schedule.name, schedule.steps, schedule.guidance_scale) == ("turbo", STEPS, 4.0)
    [measured] = json.loads(output.read_text())["measured"]
    assert Distance(*measured["checked_by"]).reaches(Distance(*measured["goals"][1]))
    assert schedule.psnr == round(measured["checked_by"][0], 2)
    assert "turbo" in capsys.readouterr().out


def test_a_search_adds_to_a_file(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(find, "GOALS", {"turbo": Method({"cache_interval": 2}), "quality": Method()})
    monkeypatch.setattr(find, "FULL_STEPS", range(5, 6))
    output = tmp_path / "schedules.json"
    search = [*options, "--schedulers", "euler", "--margin", "-20", "--output", str(output), "--rows"]
    find.main([*search, "turbo", "turbo", "--guidance_scales", "4", "4.0", "3"])
    find.main([*search, "turbo", "--guidance_scales", "4", "2", "--margin", "-21", "--keep"])
    content = json.loads(output.read_text())
    assert [schedule.guidance_scale for schedule in read_schedules(output)] == [3, 4, 2]
    assert [measured["found_with"]["margin"] for measured in content["measured"]] == [-20, -21, -21]
    with pytest.raises(SystemExit):
        find.main([*search, "quality", "--guidance_scales", "4", "--margin", "1", "--keep"])
    assert "the goal of any row" in capsys.readouterr().err
    assert json.loads(output.read_text()) == content
    output.write_text(json.dumps(content | {"measured": []}))
    with pytest.raises(SystemExit):
        find.main([*search, "turbo", "--guidance_scales", "8", "--keep"])
    assert "does not say what was measured" in capsys.readouterr().err
    for wrong, message in ((["--output", str(tmp_path)], "is a folder"), (["--schedulers", "ddpm"], "not with DDPM")):
        with pytest.raises(SystemExit):
            find.main([*search, "turbo", *wrong])
        assert message in capsys.readouterr().err


def test_a_goal_out_of_reach_is_said(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(find, "GOALS", {"quality": Method()})  # the very picture
    monkeypatch.setattr(find, "FULL_STEPS", range(6, 8))
    with pytest.raises(SystemExit):
        find.main([*options, "--guidance_scales", "4", "--rows", "quality", "--output", str(tmp_path / "x.json")])
    assert "quality: no cheaper schedule reaches the goal" in (said := capsys.readouterr().err)
    assert "the goal of any row" in said
    assert not (tmp_path / "x.json").exists()


def test_candidates_are_tried_from_the_cheapest_on(small_sd: StableDiffusionPipeline, options: list[str]) -> None:
    args = find.parse_arguments(options)
    shares, without_guidance = (
        [candidate.share for candidate in find.candidates(small_sd, args, Costs(small_sd.unet.config, 16, guided))]
        for guided in (True, False)
    )
    assert shares == sorted(shares) and shares[-1] < 1
    assert sum(without_guidance) > sum(shares)  # where a shallow step has no second branch to leave out


def test_the_costs_are_those_of_the_true_unet(tiny_sd: StableDiffusionPipeline) -> None:
    costs = Costs(SD21_BASE_UNET, 64, guided=True)
    assert costs.plain.full == pytest.approx(0.8e12, rel=0.02)
    share = costs.share
    skip: dict[str, Any] = {"cache_schedule": [0, 10], "cache_forecast": True, "cache_between": "skip"}
    for scheduler, calls in (("ddim", 50), ("pndm", 51)):
        tiny_sd.scheduler = make_scheduler(scheduler, like=tiny_sd.scheduler)
        assert share(tiny_sd, 50, Method(steps=10, scheduler="ddim")) == pytest.approx(10 / calls)
        assert share(tiny_sd, 50, Method(skip)) == pytest.approx(2 / calls)
        assert 0.9 < share(tiny_sd, 50, Method(ratio=0.5)) < 0.95


def test_a_comparison_has_a_row_for_each_way(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "INTERVALS", (3,))
    monkeypatch.setattr(compare, "FEWER_STEPS", (4,))
    monkeypatch.setattr(compare, "FAST", {"turbo": (6, 6)})
    monkeypatch.setattr(
        compare, "fast_options", lambda row, scale: {"cache_schedule": [0, 4, 8], "cache_forecast": True}
    )
    folder = tmp_path / "out"
    with torch.no_grad():
        compare.main([*options, "--guidance_scales", "4", "--output_dir", str(folder)])
    rows = json.loads((folder / "compare.json").read_text())["results"]["4"]
    ours = {"all steps", "fast turbo"}
    assert rows.keys() == ours | {
        "DeepCache 3",
        "tomesd + DeepCache 3",
        "ddim 4 steps",
        "dpm++ 4 steps",
        "unipc 4 steps",
    }
    assert rows["all steps"]["psnr"] == 100 and rows["all steps"]["share"] == 1
    assert all(row["psnr"] < 100 and row["share"] < 1 for name, row in rows.items() if name != "all steps")
    assert (folder / "compare.png").stat().st_size > 1000


def test_ways_are_chosen_by_their_names(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = compare.parse_arguments([*options, "--only", "fast b*", "tomesd + DeepCache 3"])
    assert [*compare.methods(args, "DDIMScheduler", 4.0)] == ["all steps", "fast balanced", "tomesd + DeepCache 3"]
    own = Schedule("balanced", "DDIMScheduler", STEPS, 4.0, [0, 5], [3], 40.0, 35.0, 0.2)
    content = {"version": 1, "schedules": [own._asdict()]}
    args.model_path = tmp_path  # a model with schedules of its own
    (tmp_path / "schedules.json").write_text(json.dumps(content))
    found = compare.methods(args, "DDIMScheduler", 4.0)
    assert [*found] == ["all steps", "fast balanced", "fast balanced, by guidance", "tomesd + DeepCache 3"]
    assert found["fast balanced"].options == own.options()
    with pytest.raises(SystemExit):
        compare.main([*options, "--only", "fest*"])
    assert "there are 'fast quality', 'fast balanced'" in capsys.readouterr().err
