"""run_sd.py --fast: its rows, and the schedules that were found for a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler
from PIL import Image

from runners.cache_options import FAST, count_steps, fast_options
from runners.schedule_file import FILE_NAME, Schedule, choose_schedule, read_schedules
from runners.stable_diffusion.fast import scheduler_of
from runners.unet_cost import step_flops
from tests.tiny_models import tiny_unet

ROW = Schedule("balanced", "DDIMScheduler", 8, 4.0, [0, 3], [5], 40.0, 35.0, 0.3)


def write(path: Path, *rows: Schedule, version: int = 1) -> Path:
    path.write_text(json.dumps({"version": version, "schedules": [row._asdict() for row in rows]}))
    return path


def row_with(**fields: Any) -> str:
    return json.dumps({"version": 1, "schedules": [ROW._asdict() | fields]})


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("row", FAST)
def test_a_row_has_more_full_steps_where_guidance_is_strong(row: str) -> None:
    scheduler = DDIMScheduler()
    counted = [count_steps(scheduler, 50, fast_options(row, guidance)) for guidance in (1.5, 7.5)]
    assert [each["full_steps"] for each in counted] == list(FAST[row])
    assert [sum(each.values()) for each in counted] == [50, 50]
    assert all(all(each.values()) for each in counted)


def test_the_report_counts_the_steps_of_a_row(run_sd: Callable, tmp_path: Path) -> None:
    outcome = run_sd("--prompt", "a", "--fast", "--steps", 50, "--height", 64, "--width", 64, "--guidance_scale", 7.5)
    assert outcome.code == 0, outcome.err
    report = report_of(tmp_path / "out")
    assert report["flags"]["fast"] == {"row": "balanced", "schedule": "by guidance"}
    counted = report["unet"]
    assert counted["full_steps"] == FAST["balanced"][1]
    assert counted["full_steps"] + counted["shallow_steps"] + counted["skipped_steps"] == 50
    assert counted["full_samples"] == 2 * counted["full_steps"]
    assert counted["shallow_samples"] == counted["shallow_steps"]


def test_the_share_of_the_arithmetic_is_that_of_the_steps(run_sd: Callable, tmp_path: Path) -> None:
    arguments = ["--cache_schedule", "0,2", "--forecast", "skip", "--steps", 5]
    assert run_sd("--prompt", "a", "--height", 64, "--width", 64, *arguments).code == 0
    assert report_of(tmp_path / "out")["unet"]["share"] == pytest.approx(2 / 5)
    full, shallow = step_flops(tiny_unet().config, 8, 8)
    assert 0 < shallow < full / 4


def test_a_file_beside_the_model_is_found_and_its_steps_are_taken(
    run_sd: Callable, small_sd_dir: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(small_sd_dir, tmp_path / "model")
    kind = json.loads((model / "scheduler/scheduler_config.json").read_text())["_class_name"]
    write(model / FILE_NAME, ROW._replace(scheduler=kind))
    arguments = [
        "--prompt",
        "a",
        "--fast",
        "--model_path",
        model,
        "--height",
        64,
        "--width",
        64,
        "--guidance_scale",
        4,
    ]
    outcome = run_sd(*arguments, "--steps", 8)
    assert outcome.code == 0
    assert f"2 full steps, 1 shallow ones, 5 forecast whole; steps of {model / FILE_NAME}" in outcome.out
    report = report_of(tmp_path / "out")
    assert report["flags"]["fast"] == {"row": "balanced", "schedule": str(model / FILE_NAME)}
    assert (report["unet"]["full_steps"], report["unet"]["shallow_steps"]) == (2, 1)
    assert run_sd(*arguments, "--steps", 9).code == 0
    assert report_of(tmp_path / "out")["flags"]["fast"]["schedule"] == "by guidance"
    outcome = run_sd(*arguments, "--steps", 9, "--schedule", model / FILE_NAME)
    assert outcome.code != 0 and "has none for --fast balanced with" in outcome.err


def test_a_picture_that_is_changed_takes_steps_by_guidance(
    run_sd: Callable, small_sd_dir: Path, tmp_path: Path
) -> None:
    """Its first steps are not taken, and the file numbers all."""
    model = shutil.copytree(small_sd_dir, tmp_path / "model")
    write(model / FILE_NAME, ROW._replace(scheduler=scheduler_of(model), steps=30, full_steps=[0, 3, 28]))
    picture = tmp_path / "picture.png"
    Image.new("RGB", (64, 64), "teal").save(picture)
    arguments = ["--prompt", "a", "--fast", "--model_path", model, "--image", picture, "--steps", 30]
    outcome = run_sd(*arguments, "--strength", 0.5)
    assert outcome.code == 0, outcome.err
    report = report_of(tmp_path / "out")
    assert report["flags"]["fast"]["schedule"] == "by guidance"
    assert sum(report["unet"][f"{kind}_steps"] for kind in ("full", "shallow", "skipped")) == 15
    outcome = run_sd(*arguments, "--schedule", model / FILE_NAME)  # whose default strength skips some, too
    assert outcome.code != 0 and "skips 6 of them" in outcome.err


def test_the_scheduler_of_a_model_is_the_one_that_is_loaded(small_sd_dir: Path, tmp_path: Path) -> None:
    model = shutil.copytree(small_sd_dir, tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    (model / "model_index.json").write_text(json.dumps(index))
    assert scheduler_of(model) == "EulerDiscreteScheduler"
    (model / "model_index.json").write_text(json.dumps(index | {"scheduler": 3}))
    assert scheduler_of(model) == ""


def test_the_schedule_for_the_least_guidance_that_is_enough(tmp_path: Path) -> None:
    rows = [ROW._replace(guidance_scale=scale) for scale in (7.5, 1.5, 4.0)]
    schedules = read_schedules(write(tmp_path / "rows.json", *rows))
    assert schedules == rows

    def guidance_for(scale: float) -> float | None:
        found = choose_schedule(schedules, "balanced", "DDIMScheduler", 8, scale)
        return found and found.guidance_scale

    assert [guidance_for(scale) for scale in (1.0, 1.5, 2.0, 7.5, 8.0)] == [1.5, 1.5, 4.0, 7.5, None]
    assert choose_schedule(schedules, "turbo", "DDIMScheduler", 8, 4.0) is None
    assert choose_schedule(schedules, "balanced", "PNDMScheduler", 8, 4.0) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no JSON", "is no file of schedules"),
        ('{"version": 1, "schedules": [{"name": "x"}]}', "is no file of schedules"),
        ('{"version": 2, "schedules": []}', "is of version 2"),
        ("{}", "it has no 'version'"),
        ("[" * 100_000, "is no file of schedules"),
        (row_with(full_steps=3), "full_steps must be a list of whole numbers, not 3"),
        (row_with(full_steps=["0"]), "full_steps must be a list"),
        (row_with(shallow_steps=None), "shallow_steps must be a list"),
        (row_with(shallow_steps=[3]), "none of them listed twice"),
        (row_with(guidance_scale="7"), "guidance_scale must be a number"),
        (row_with(psnr=float("nan")), "psnr must be a number"),
        (row_with(guidance_scale=10**400), "guidance_scale must be a number"),
        (
            row_with(full_steps=[1, 7]),
            "file.json is no file of schedules, as scripts/schedules/find.py writes them: the",
        ),
        (row_with(full_steps=[0, 60]), "none beyond the last listed"),
        (json.dumps({"version": 1, "schedules": [ROW._asdict()] * 2}), "two are for the same name"),
        (None, "cannot read"),
    ],
)
def test_a_file_of_something_else_is_one_line(
    run_sd: Callable, tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content)
    outcome = run_sd("--prompt", "a", "--fast", "--schedule", path)
    assert outcome.code != 0 and message in outcome.err and len(outcome.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fast", "--DC"], "--DC has no meaning beside --fast"),
        (["--fast", "turbo", "--forecast"], "--forecast has no meaning beside --fast"),
        (["--forecast", "skip"], "--forecast needs --DC"),
        (["--schedule", "x.json"], "no effect without --fast"),
        (["--fast", "--schedule", "x.json", "--model_path", __file__], "name it by --scheduler"),
        (["--fast", "--scheduler", "euler_a"], "not with EulerAncestral"),
        (["--DC", "4", "--cache_schedule", "early:4"], "counts the full steps"),
    ],
)
def test_arguments_that_do_not_fit_together(run_sd: Callable, arguments: list[str], message: str) -> None:
    outcome = run_sd("--prompt", "a", *arguments)
    assert outcome.code != 0 and message in outcome.err
