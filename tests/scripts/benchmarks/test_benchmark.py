"""Several guidance scales, schedules of a file and fewer steps in one run, with what was measured kept."""

import json
from pathlib import Path

import pytest

from scripts.benchmarks import benchmark

SCHEDULE = {
    "name": "balanced",
    "scheduler": "DDIMScheduler",
    "steps": 6,
    "full_steps": [0, 2],
    "shallow_steps": [1],
    "psnr": 40.0,
    "psnr_worst_tenth": 30.0,
    "share": 0.4,
}


def test_each_value_is_timed_with_its_own_steps(
    tiny_sd_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [SCHEDULE | {"guidance_scale": 2.0}, SCHEDULE | {"guidance_scale": 8.0, "full_steps": [0, 2, 3, 4, 5]}]
    schedules = tmp_path / "schedules.json"
    schedules.write_text(json.dumps({"version": 1, "schedules": rows}))
    options = ["--model", str(tiny_sd_dir), "--device", "cpu", "--steps", "6", "--rounds", "1", "--fewer_steps", "4"]
    options += ["--interval", "2", "3"]
    options += ["--guidance_scale", "2", "8", "--schedule", str(schedules), "--output_dir", str(tmp_path)]
    benchmark.main([*options, "--configs", "DC", "DPM++ 2M", "fast balanced"])
    found = json.loads((tmp_path / "benchmark.json").read_text())
    steps = {
        "none": (6, 0),
        "DC, interval 2": (3, 3),
        "DC, interval 3": (2, 4),
        "DPM++ 2M": (4, 0),
        "fast balanced, guidance 2": (2, 1),
        "fast balanced, guidance 8": (5, 1),
    }
    names = list(steps)
    assert {name: (row["full_steps"], row["shallow_steps"]) for name, row in found["results"].items()} == steps
    assert [row.get("interval") for row in found["results"].values()] == [None, 2, 3, None, None, None]
    assert found["settings"]["schedule"] == str(schedules)
    assert found["results"]["none"]["relative_error"] == 0
    assert all(found["results"][name]["relative_error"] > 0 for name in names[1:-1])
    assert found["results"][names[-1]]["relative_error"] is None  # the plain latents are of guidance 2
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--configs", "FA", "--schedule", "x.json"], "no effect without a configuration of --fast"),
        (["--configs", "DC", "--interval", "1"], "has no effect: all 12 steps"),
        (["--configs", "DDIM", "--fewer_steps", "5000"], "trained with 1000"),
        (["--configs", "TOME", "--ratio", "nan"], "--ratio"),
        (["--guidance_scale", "1", "4"], "time those up to 1 apart"),
    ],
)
def test_what_cannot_be_timed_is_said_before(
    tiny_sd_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--model", str(tiny_sd_dir), "--device", "cpu", "--output_dir", str(tmp_path), *options])
    assert message in capsys.readouterr().err


def test_the_pipeline_is_left_as_it_was(tiny_sd_dir: Path) -> None:
    args = benchmark.parse_arguments(["--model", str(tiny_sd_dir), "--device", "cpu"])
    pipe = benchmark.make_pipeline(args, benchmark.DeviceManager("cpu"), benchmark.torch.float32)
    scheduler, processors = pipe.scheduler, dict(pipe.unet.attn_processors)
    with benchmark.switched_on(pipe, ("FA", "UniPC"), args):
        assert type(pipe.scheduler).__name__ == "UniPCMultistepScheduler"
        assert pipe.unet.attn_processors != processors
    assert pipe.scheduler is scheduler
    assert pipe.unet.attn_processors == processors
