"""The comparison: what its rows say, that they hold together, and what does not belong together."""

import json
import platform
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from runners.cli import UserError
from runners.clip.benchmark import Configuration, PerformanceBenchmark, Task, comparison_table, merge, rows_of
from runners.clip.benchmark_run import main

TEXTS = ("a cat", "a dog")
ROW = {
    "device", "fp16", "num_runs", "mean_ms", "std_ms", "min_ms", "max_ms", "p50_ms", "p95_ms", "p99_ms",
    "throughput_per_sec",
}  # fmt: skip


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_a_row_has_speed_accuracy_and_batches(clip_dir: Path, image: Path) -> None:
    benchmark = PerformanceBenchmark(str(clip_dir))
    task = Task(image, TEXTS, runs=3, warmup=1, batch_sizes=(1, 4))
    exact = benchmark.measure(Configuration("cpu", "float32", "torch", str(clip_dir)), task)
    rough = benchmark.measure(Configuration("cpu", "bfloat16", "torch", str(clip_dir)), task)
    assert exact is not None and rough is not None
    assert exact.keys() >= ROW and exact["end_to_end"].keys() >= ROW - {"fp16", "num_runs"}
    assert list(exact["batches"]) == ["1", "4"]
    assert exact["accuracy"] == {"max_logit_error": 0, "cosine": pytest.approx(1), "top1_agreement": 1}
    assert 1e-4 < rough["accuracy"]["max_logit_error"] < 0.5 and 0.99 < rough["accuracy"]["cosine"] < 0.99999
    assert set(benchmark.results) == {"cpu_fp32", "cpu_bf16"}


def test_accuracy_is_of_the_configuration(clip_dir: Path, tmp_path: Path, image: Path) -> None:
    """A model that is another one shows."""
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(clip_dir)
    torch.nn.init.normal_(model.visual_projection.weight, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "other")
    AutoProcessor.from_pretrained(clip_dir).save_pretrained(tmp_path / "other")
    benchmark = PerformanceBenchmark(str(clip_dir))
    row = benchmark.measure(
        Configuration("cpu", "float32", "torch", str(tmp_path / "other")), Task(image, TEXTS, runs=1, warmup=0)
    )
    assert row is not None and row["accuracy"]["cosine"] < 0.9 and row["first_ms"] is None


def test_an_absent_device_is_a_line_and_no_row(
    clip_dir: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = PerformanceBenchmark(str(clip_dir))
    assert benchmark.benchmark_device("cuda:99", image, TEXTS) is None
    assert "warning: cuda:99_fp32 is left out: device 'cuda:99' is not there" in capsys.readouterr().err
    with pytest.raises(UserError, match="nothing could be measured"):
        benchmark.run_comparison(image, TEXTS, devices=[])


def test_devices_are_measured_in_processes_of_their_own(
    clip_dir: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of one is left in the memory of the next."""
    orders = []

    def answer(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        order = json.loads(Path(command[-2]).read_text())
        orders.append(order["configuration"])
        Path(command[-1]).write_text(json.dumps({"results": {"cpu_fp32": {"mean_ms": 1}}, "skipped": {}}))
        return subprocess.CompletedProcess(command, 0, "", "")

    benchmark = PerformanceBenchmark(str(clip_dir))
    monkeypatch.setattr(benchmark, "measure", lambda *_: pytest.fail("measured in this process"))
    monkeypatch.setattr(subprocess, "run", answer)
    assert benchmark.run_comparison(image, TEXTS, devices=["cpu"]) == {"cpu_fp32": {"mean_ms": 1}}
    assert [(order["device"], order["dtype"]) for order in orders] == [("cpu", "float32")]


@pytest.mark.slow
def test_the_program_on_a_machine_without_accelerators(
    clip_dir: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out/results.json"
    options = ["--num-runs", "2", "--warmup-runs", "1", "--batch-sizes", "2", "--output", str(output)]
    main("benchmark.py", "", ["--model", str(clip_dir), "--image", str(image), "--devices", "cpu", "npu", *options])
    content = json.loads(output.read_text())
    assert set(rows_of(content)) == {"cpu_fp32"} and content["cpu_fp32"]["num_runs"] == 2
    assert content["settings"]["texts"] == ["a photo of a cat", "a photo of a dog"]
    assert "npu_fp32" in content["settings"]["skipped"]
    table = capsys.readouterr().out
    assert "cpu_fp32" in table and max(map(len, table.splitlines()[:-1])) <= 80


def test_results_of_several_environments_are_merged(clip_dir: Path, image: Path, tmp_path: Path) -> None:
    benchmark = PerformanceBenchmark(str(clip_dir))
    benchmark.measure(Configuration("cpu", "float32", "torch", str(clip_dir)), Task(image, TEXTS, runs=2, warmup=0))
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    benchmark.save_results(one)
    content = json.loads(one.read_text())
    assert content["environment"]["versions"]["torch"] == torch.__version__
    assert content["environment"]["host"] == platform.node() and content["settings"]["model"] == str(clip_dir)
    assert content["cpu_fp32"]["environment"].keys() >= {"name", "chip", "total_memory"}
    content["cuda_fp16"] = content.pop("cpu_fp32")
    other.write_text(json.dumps(content))
    merged = merge([one, other])
    assert list(merged) == ["cpu_fp32", "cuda_fp16"] and merged["cuda_fp16"]["environment"]["machine"]
    assert comparison_table(merged).splitlines()[1].split()[0] in merged
    with pytest.raises(UserError, match="which one counts"):
        merge([one, one])
    content["settings"]["texts"] = ["another"]
    other.write_text(json.dumps(content))
    with pytest.raises(UserError, match="different models or texts"):
        merge([one, other])
    other.write_text("{}")
    with pytest.raises(UserError, match="no result of benchmark.py"):
        merge([other])
