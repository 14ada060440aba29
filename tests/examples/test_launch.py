"""Several processes through the launcher, on the CPU with gloo."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.programs import ROOT, run_forked

LAUNCH = ROOT / "examples/launch.py"
RUN_SD = ROOT / "examples/sd2.1/run_sd.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def launch(
    devices: str, *command: object, launcher: Sequence[object] = (), environment: Mapping[str, str] = {}
) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, LAUNCH, "--device_list", devices, *launcher, "--", *command]
    variables = ENVIRONMENT | environment
    return subprocess.run(list(map(str, line)), capture_output=True, text=True, env=variables, check=False)


def draw(output_dir: Path, model: Path, *arguments: object) -> list[object]:
    options = ["--device", "cpu", "--steps", 3, "--height", 64, "--width", 64, "--model_path", model]
    return [RUN_SD, *options, "--FA", "--TOME", "--DC", 2, "--output_dir", output_dir, *arguments]


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))}


def test_two_devices_draw_the_pictures_of_one(tiny_sd_dir: Path, tmp_path: Path) -> None:
    prompts = ["--prompt", "a red circle", "--prompt", "a blue square", "--num_images", 2]
    alone = [sys.executable, *draw(tmp_path / "one", tiny_sd_dir, *prompts)]
    subprocess.run(list(map(str, alone)), check=True, capture_output=True, env=ENVIRONMENT)
    (tmp_path / "temporary").mkdir()
    command = draw(tmp_path / "two", tiny_sd_dir, *prompts)
    result = launch("0,1", *command, environment={"TMPDIR": str(tmp_path / "temporary")})
    assert result.returncode == 0, result.stderr
    assert not list((tmp_path / "temporary").glob("diffusers-npu-*"))
    one, two = pictures(tmp_path / "one"), pictures(tmp_path / "two")
    assert len(one) == 4 and one.keys() == two.keys()
    for name, picture in one.items():  # a batch of half the size may sum in another order
        assert np.abs(picture - two[name]).max() <= 1
    report = json.loads((tmp_path / "two/report.json").read_text())
    assert report["devices"] == {"all": 2, "for each picture": 2}
    assert [entry["file"] for entry in report["images"]] == sorted(one)


def test_each_device_draws_prompts_of_its_own(tiny_sd_dir: Path, tmp_path: Path) -> None:
    prompts = [argument for name in ("one", "two", "three") for argument in ("--prompt", name)]
    result = launch("0,1", *draw(tmp_path, tiny_sd_dir, *prompts, "--cfg_parallel", 1))
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert [entry["prompt"] for entry in report["images"]] == ["one", "two", "three"]
    assert [entry["seed"] for entry in report["images"]] == [0, 1, 2]
    assert len(pictures(tmp_path)) == 3


def test_ranks_with_other_settings_are_named(tiny_sd_dir: Path, tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys, runpy\n"
        "sys.argv = sys.argv[1:] + ['--seed', os.environ['RANK']]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    result = launch("0,1", script, *draw(tmp_path, tiny_sd_dir, "--prompt", "x"))
    assert result.returncode == 2
    assert "rank 1 was started with other settings than rank 0: seed is 1 instead of 0" in result.stderr
    assert not pictures(tmp_path)


# By what is wrong on the launcher's line.
MISTAKES = {
    "'0,0' must name each device once, in ascending order": ["--device_list", "0,0"],
    "'1,0' must name each device once, in ascending order": ["--device_list", "1,0"],
    "'0,x' is not a list of numbers such as 0,1": ["--device_list", "0,x"],
    "--nnodes 2 needs --rdzv_endpoint HOST:PORT": ["--device_list", "0,1", "--nnodes", "2"],
    "--node_rank 1 must be less than --nnodes, which is 1": ["--device_list", "0,1", "--node_rank", "1"],
    "'somewhere' is not a host and a port": ["--device_list", "0,1", "--rdzv_endpoint", "somewhere"],
}


def test_mistakes_on_the_line_are_one_line() -> None:
    runs = run_forked([([LAUNCH, *line, "--", "x.py"], {}) for line in MISTAKES.values()], ["torch.distributed.run"])
    for message, done in zip(MISTAKES, runs, strict=True):
        assert done.returncode == 2, message
        assert message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_devices_count_within_those_that_a_scheduler_left(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text("import os; print('sees', os.environ['ASCEND_RT_VISIBLE_DEVICES'])")
    scheduled = {"ASCEND_RT_VISIBLE_DEVICES": "4,6,7"}
    result = launch("0,2", script, environment=scheduled)
    assert result.returncode == 0 and result.stdout.splitlines()[0] == "sees 4,7", result.stderr
    result = launch("0,3", script, environment=scheduled)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "devices 0,3: ASCEND_RT_VISIBLE_DEVICES=4,6,7 was set before" in result.stderr


@pytest.mark.parametrize(
    ("visible", "device", "expected"),
    [
        (None, "1", "1"),
        ("4,6", "1", "6"),
        ("", "1", ""),
        ("4,6", "2", "error: device 2: ASCEND_RT_VISIBLE_DEVICES=4,6 was set before"),
        (None, "x", "error: --device_list x: this is no list of numbers"),
    ],
)
def test_a_single_device_counts_within_those_that_a_scheduler_left(
    tmp_path: Path, visible: str | None, device: str, expected: str
) -> None:
    script = tmp_path / "examples/sd2.1/run_sd.sh"  # beside a set-up and a Python that do nothing
    script.parent.mkdir(parents=True)
    script.write_text((ROOT / "examples/sd2.1/run_sd.sh").read_text())
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$ASCEND_RT_VISIBLE_DEVICES"\n')
    python.chmod(0o755)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/setup_env.sh").write_text(f"echo {python}")
    environment = {name: value for name, value in os.environ.items() if not name.endswith("VISIBLE_DEVICES")}
    if visible is not None:
        environment["ASCEND_RT_VISIBLE_DEVICES"] = visible
    command = ["bash", str(script), f"--device_list={device}", "--prompt", "x"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == (2 if expected.startswith("error") else 0)
    assert (result.stderr or result.stdout).strip().startswith(expected)


def test_a_port_that_another_program_has() -> None:
    with socket.create_server(("", 0)) as server:
        endpoint = f"localhost:{server.getsockname()[1]}"
        result = launch("0,1", "x.py", launcher=["--rdzv_endpoint", endpoint])
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"error: --rdzv_endpoint {endpoint}: the ranks cannot meet there" in result.stderr
    assert "address already in use" in result.stderr


def test_two_machines(tmp_path: Path) -> None:
    """Two launchers stand for the machines; both count as many ranks, and each has its own."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, pathlib, sys\n"
        "import torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "file = pathlib.Path(sys.argv[1], os.environ['RANK'])\n"
        "file.write_text(f'{dist.get_world_size()} {os.environ[\"GROUP_RANK\"]}')\n"
        "dist.destroy_process_group()\n"
    )
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    meet = ["--nnodes", 2, "--rdzv_endpoint", f"localhost:{port}", "--node_rank"]
    with ThreadPoolExecutor() as machines:
        results = list(machines.map(lambda node: launch("0,1", script, tmp_path, launcher=[*meet, node]), range(2)))
    assert [result.returncode for result in results] == [0, 0], results
    assert [(tmp_path / str(rank)).read_text() for rank in range(4)] == ["4 0", "4 0", "4 1", "4 1"]


def start_ranks_that_wait(tmp_path: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """The launcher, and the process numbers of its two ranks."""
    script = tmp_path / "wait.py"
    script.write_text(
        "import os, pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, LAUNCH, "--device_list", "0,1", "--", script, tmp_path]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    pids = [wait_for(tmp_path / str(rank)) for rank in range(2)]
    return process, pids


def test_a_killed_rank_ends_the_others_and_is_named(tmp_path: Path) -> None:
    process, pids = start_ranks_that_wait(tmp_path)
    os.kill(pids[1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=240)  # the others sleep for longer
    assert process.returncode == 128 + signal.SIGKILL
    assert "rank 1 was ended by SIGKILL, and the others have been ended" in stderr
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_a_launcher_that_is_terminated_ends_its_ranks_and_says_so(tmp_path: Path) -> None:
    process, pids = start_ranks_that_wait(tmp_path)
    process.terminate()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert stderr.splitlines()[-1] == "error: the ranks were ended by SIGTERM"
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def wait_for(file: Path) -> int:
    deadline = time.monotonic() + 240
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < deadline, f"{file} was not written"
        time.sleep(0.05)
    return int(file.read_text())
