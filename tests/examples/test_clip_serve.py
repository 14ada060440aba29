"""The service as a program, with Ray Serve: under load, with a replica killed, and stopped."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys

import pytest

from runners.clip.serving.run import main
from tests.programs import ROOT, environment

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="requirements-serve.txt")
MODEL = ["--model", str(ROOT / "examples/clip/demo_model"), "--device", "cpu"]


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        main("serve.py", "", [*MODEL, *map(str, arguments)])
    assert ended.value.code != 0
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets others in: give a token"),
        (["--device", "cpu:0"], "replicas get a device of that kind each"),
        (["--token_file", "/nonexistent"], "No such file or directory: /nonexistent"),
        (["--wait_ms", "0"], "--wait_ms: must be more than 0"),
        (["--backend", "onnx", "--fp16"], "--backend onnx computes as its files were converted"),
    ],
)
def test_bad_arguments_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    error = error_of(capsys, *arguments)
    assert message in error and error.count("\n") == 1


def test_a_port_that_another_program_has_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"--port {port}: Address already in use" in error_of(capsys, "--port", port)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_nothing_is_lost_with_a_replica_or_at_the_end() -> None:
    command = [sys.executable, str(ROOT / "scripts/benchmarks/clip_load.py"), "losses", "--requests", "600"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    assert "('good', 200): 540" in done.stdout and "('malformed', 400): 60" in done.stdout
    assert "stopped under load" in done.stdout
