"""CLIP's programs, from their command lines to their files and exit codes."""

import json
from pathlib import Path

import pytest
from PIL import Image

from runners.clip import run
from runners.offline import run as convert_run
from tests.tiny_clip import save_tiny_clip


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def look(*arguments: object) -> int:
    """The exit code of pytorch_npu_inference.py."""
    try:
        run.main("pytorch_npu_inference.py", "", [*map(str, arguments)])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_pictures_folders_and_rows(
    clip_dir: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [{"image": "picture.png", "texts": ["x", "y", "z"]}, {"image": "absent.png"}, {"image": "picture.png"}]
    rows.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    output = tmp_path / "results.jsonl"
    where = ("--model", clip_dir, "--device", "cpu", "--image", tmp_path, "--input", rows, "--output", output)
    assert look(*where, "--json") == 1
    done = capsys.readouterr()
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert [json.loads(line) for line in done.out.splitlines()] == [r for r in results if "error" not in r]
    assert [len(r.get("texts", ())) for r in results] == [2, 3, 0, 2]
    assert "absent.png" in results[2]["error"] and results[2]["error"] in done.err
    assert done.err.strip().endswith("error: 1 of 4 pictures could not be read")
    assert results[0]["logits"] == pytest.approx(results[3]["logits"], abs=1e-4)


def test_words_for_people(clip_dir: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert look("--model", clip_dir, "--device", "cpu", "--image", picture, "--benchmark") == 0
    out = capsys.readouterr().out
    assert f"{picture}: a photo of a " in out and "ms on cpu" in out and "p50_ms" in out
    assert "too few samples lie beyond p99_ms" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--image says which pictures"),
        (["--image", "absent"], "--image absent does not exist"),
        (["--image", "{empty}"], "holds no picture"),
        (["--image", "{picture}", "--texts", " "], "--texts has an empty text"),
        (["--image", "{picture}", "--fp16", "--dtype", "float32"], "name two precisions"),
        (["--image", "{picture}", "--backend", "onnx", "--FA", "--fp16"], "--fp16, --FA: --backend onnx computes"),
        (["--image", "{picture}", "--device", "npu:9"], "device 'npu:9' is not there"),
        (["--image", "{picture}", "--model", "absent/model"], "there is no folder absent/model"),
        (["--input", "{bad}"], "line 2 names no image"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    clip_dir: Path,
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"image": "a.png"}\n{"picture": "a.png"}\n')
    names = {"picture": picture, "empty": tmp_path / "empty", "bad": tmp_path / "bad.jsonl"}
    assert look("--model", clip_dir, *(each.format(**names) for each in arguments)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_a_conversion_that_fails_has_an_exit_code(
    clip_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "bin/atc"
    script.parent.mkdir()
    script.write_text('#!/bin/sh\necho "E10016: no such input"\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=":")
    (tmp_path / "a.onnx").write_bytes(b"")
    given = ["onnx", "--model", str(tmp_path / "a.onnx"), "--output", str(tmp_path / "a.om")]

    def convert(*arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            convert_run.main("convert_to_om.py", "", [*arguments])
        assert end.value.code
        return capsys.readouterr().err

    assert "E10016: no such input" in convert(*given, "--soc-version", "Ascend310P3")
    assert not (tmp_path / "a.om").exists()
    assert "Ascend910B1" in convert(*given, "--soc-version", "Ascend910B")
    dims = ("--input-shape", "x:-1,-1", "--dynamic-dims", "1;2", "--soc-version", "Ascend310P3")
    assert "has 1 values, and the inputs have 2 times -1" in convert(*given, *dims)
    assert "No such file" in convert(
        "onnx", "--model", "absent.onnx", "--output", "a.om", "--soc-version", "Ascend310P3"
    )


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--soc-version", "Ascend310P3"], 1, "atc is not on PATH: it is a part of CANN's toolkit"),
        (["--opset", "11", "--onnx-only"], 2, "argument --opset: invalid choice: 11 (choose from 18, 17)"),
        (["--opset", "21", "--onnx-only"], 2, "argument --opset: invalid choice: 21 (choose from 18, 17)"),
        (["--model", "absent/model", "--onnx-only"], 2, "there is no folder absent/model"),
        (["--batch-size", "0", "--onnx-only"], 2, "must be 1 or more, not 0"),
        (["--image-size", "64", "--onnx-only"], 2, "--image-size 64: the model's pictures have 32 pixels"),
        (["--text-length", "99", "--onnx-only"], 2, "--text-length 99: the model's texts have 77 tokens"),
        (["--dynamic-batch", "--batch-size", "2", "--onnx-only"], 2, "--batch-size 2 has no place there"),
        (["--output-dir", "{file}", "--onnx-only"], 2, "cannot write to output directory"),
    ],
)
def test_what_cannot_be_converted_is_one_line(
    arguments: list[str],
    code: int,
    message: str,
    clip_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("onnx")
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "file").touch()
    given = ["--model", str(clip_dir), "--output-dir", str(tmp_path / "out"), *arguments]
    with pytest.raises(SystemExit) as end:
        convert_run.main("convert_to_om.py", "", ["clip", *(each.format(file=tmp_path / "file") for each in given)])
    assert end.value.code == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not list(tmp_path.glob("out/*"))
