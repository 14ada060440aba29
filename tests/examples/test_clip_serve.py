"""The service as a program, with Ray Serve: under load, with a replica killed, and stopped."""

from __future__ import annotations

import importlib.util
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from runners.clip.serving.run import main, parse_arguments, settings_of
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
        (["--max_inputs", "65", "--max_pending", "64"], "--max_inputs 65: no request of so many is ever taken"),
        (["--max_megapixels", "0"], "--max_megapixels: must be 1 or more"),
    ],
)
def test_bad_arguments_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    error = error_of(capsys, *arguments)
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b" \n", "must be one word, not 0"),
        (b"two words", "must be one word, not 2"),
        (b"schl\xfcssel", "no UTF-8 text: invalid start byte at byte 4"),
    ],
)
def test_a_token_that_no_client_can_bring(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "token").write_bytes(content)
    error = error_of(capsys, "--token_file", tmp_path / "token")
    assert f"the token of {tmp_path / 'token'}" in error and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "inputs", "pending"),
    [
        ([], 256, 256 + 8 * 16),
        (["--max_pending", "64"], 64, 64),
        (["--max_pending", "1000"], 256, 1000),
        (["--max_inputs", "300", "--replicas", "2"], 300, 300 + 2 * 8 * 16),
    ],
)
def test_a_request_of_as_many_inputs_as_may_be_is_taken_when_nobody_waits(
    given: list[str], inputs: int, pending: int
) -> None:
    settings = settings_of(parse_arguments("serve.py", "", [*MODEL, *given]))
    assert (settings.inputs, settings.pending) == (inputs, pending)


def test_a_port_that_another_program_has_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"--port {port}: Address already in use" in error_of(capsys, "--port", port)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_says_when_it_serves_and_ends_quietly() -> None:
    port = free_port()
    command = [sys.executable, str(ROOT / "examples/clip/serve.py"), *MODEL, "--port", str(port)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    ) as process:
        assert process.stdout is not None
        while f"http://127.0.0.1:{port} serves" not in (line := process.stdout.readline()):
            assert line, "it ended"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == ""
    assert process.returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_nothing_is_lost_with_a_replica_or_at_the_end() -> None:
    command = [sys.executable, str(ROOT / "scripts/benchmarks/clip_load.py"), "losses", "--requests", "600"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    assert "('good', 200): 540" in done.stdout and "('malformed', 400): 60" in done.stdout
    assert "stopped under load" in done.stdout
