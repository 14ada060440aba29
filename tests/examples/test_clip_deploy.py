"""deploy.sh, from its command line to its reports and exit codes."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from runners.clip.deploy import GATE
from runners.clip.gate import LIMITS, Limits
from scripts.demo_clip.deployment import main
from tests.programs import ROOT
from tests.tiny_clip import save_tiny_clip

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

FEW = ("--scenes", "20", "--num-runs", "2")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PREFERRED_DEVICE", "cpu")
    yield


def put_atc(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script in atc's place."""
    folder.mkdir()
    (folder / "atc").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "atc").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def hide_atc(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = os.environ["PATH"].split(os.pathsep)
    monkeypatch.setenv("PATH", os.pathsep.join(each for each in folders if not Path(each, "atc").exists()))


def report(folder: Path) -> tuple[dict, str]:
    return json.loads((folder / "deploy_report.json").read_text()), (folder / "deploy_report.md").read_text()


def test_without_atc_it_ends_at_onnx_files_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hide_atc(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deployed_models").mkdir()
    (tmp_path / "deployed_models/text_tower.om").write_text("of an earlier run")
    main("deploy.sh", "", [*FEW, "--no-benchmark"])
    content, markdown = report(tmp_path / "deployed_models")  # the default, where it was called
    assert content["result"] == "deployed" and "benchmark" not in content
    assert "ONNX files only: atc is not on PATH" in content["warnings"][0] and content["warnings"][0] in markdown
    assert content["accuracy"]["cpu_onnx"]["passed"] and content["accuracy"]["cpu_onnx"]["right"] > 0.9
    assert content["conversion"]["files"].keys() == {"image_tower.onnx", "text_tower.onnx"}
    assert not list((tmp_path / "deployed_models").glob("*.om"))
    assert GATE in markdown and "cpu_onnx" in markdown
    assert "demo CLIP" in capsys.readouterr().out


@pytest.mark.slow
def test_it_measures_what_it_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_atc(monkeypatch)
    main("deploy.sh", "", [*FEW, "--output-dir", str(tmp_path), "--batch-size", "2"])
    content, markdown = report(tmp_path)
    assert content["conversion"]["config"]["batch_size"] == 2
    assert {"cpu_fp32", "cpu_onnx"} <= content["benchmark"].keys() and "## Speed" in markdown
    assert json.loads((tmp_path / "benchmark_results.json").read_text())["cpu_onnx"]["num_runs"] == 2
    assert (tmp_path / "test_image.png").stat().st_size


def test_files_that_answer_otherwise_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hide_atc(monkeypatch)
    monkeypatch.setitem(LIMITS, "float32", Limits(changed=0.0, cosine=1.1))
    with pytest.raises(SystemExit) as end:
        main("deploy.sh", "", [*FEW, "--model", str(save_tiny_clip(tmp_path / "clip")), "--output-dir", str(tmp_path)])
    assert end.value.code == 1
    content, markdown = report(tmp_path)
    assert content["result"] == "failed in accuracy: cpu_onnx beyond what may differ from torch's float32 on the CPU"
    assert not content["accuracy"]["cpu_onnx"]["passed"] and "benchmark" not in content
    assert content["result"] in markdown and content["result"].partition(": ")[2] in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, atc, code, message",
    [
        (["--unknown"], "", 2, "unrecognized arguments: --unknown"),
        (["--scenes", "9999"], "", 2, "--scenes 9999: there are 2000"),
        (["--model", "absent/model"], "", 2, "there is no folder absent/model"),
        (["--dynamic-batch", "--batch-size", "3"], "", 2, "--batch-size 3 has no place there"),
        (["--soc-version", "Ascend910"], "exit 1", 1, "is a family of chips"),
        (["--soc-version", "Ascend310P3"], "", 1, "atc is not on PATH"),
        pytest.param(
            ["--soc-version", "Ascend310P3"],
            "echo E40000; exit 3",
            1,
            "atc ended with exit code 3",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_it_ends_at_the_first_failure(
    arguments: list[str],
    atc: str,
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hide_atc(monkeypatch)
    if atc:
        put_atc(tmp_path / "bin", atc, monkeypatch)
    with pytest.raises(SystemExit) as end:
        main("deploy.sh", "", [*FEW, "--output-dir", str(tmp_path / "out"), *arguments])
    assert end.value.code == code
    assert message in capsys.readouterr().err.splitlines()[-1].replace("\n", " ")
    assert not list(tmp_path.glob("out/*.om")) and not (tmp_path / "out/benchmark_results.json").exists()


def test_the_script_passes_all_on_from_any_folder(tmp_path: Path) -> None:
    root = tmp_path / "a checkout"
    (root / "examples/clip").mkdir(parents=True)
    (root / "scripts").mkdir()
    script = root / "examples/clip/deploy.sh"
    script.write_text((ROOT / "examples/clip/deploy.sh").read_text())
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nshift; printf "%s\\n" "$PWD" "$@"; exit 7\n')
    python.chmod(0o755)
    (root / "scripts/setup_env.sh").write_text(f'test "$*" = --onnx && echo "{python}"')
    given = ["--output-dir", "a'b; c", "-h"]
    done = subprocess.run(["bash", script, *given], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path), *given]
