"""`--check-races`: what nothing orders is found, with the lines of both sides, and nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.programs import ROOT, environment, run_forked

pytestmark = pytest.mark.skipif("CANN_EMULATOR_SOC" not in os.environ, reason="of the emulator")

RACES = 66  # the exit code
START = """
import torch, torch_npu
torch.npu.set_compile_mode(jit_compile=False)
side, current = torch.npu.Stream(), torch.npu.current_stream()
"""
# Programs by what is in their place of {order}, without which the line `# first` and the line `# second` race.
ORDERED = {
    "current.wait_stream(side)": """
        x, source = torch.zeros(1000, device="npu"), torch.ones(1000).pin_memory()
        torch.npu.synchronize()
        with torch.npu.stream(side):
            x.copy_(source, non_blocking=True)  # first
        {order}
        y = x + 1  # second
    """,
    "current.wait_event(copied)": """
        x, source, copied = torch.zeros(1000, device="npu"), torch.ones(1000).pin_memory(), torch.npu.Event()
        torch.npu.synchronize()
        with torch.npu.stream(side):
            x.copy_(source, non_blocking=True)  # first
            copied.record()
        {order}
        x[10:20] = 1  # second
    """,
    "x.record_stream(side)": """
        x = torch.ones(1000, device="npu")
        side.wait_stream(current)
        with torch.npu.stream(side):
            y = x * 2  # first
        {order}
        del x
        z = torch.zeros(1000, device="npu")  # second
    """,
    "side.synchronize()": """
        x, target = torch.ones(2, 1000, device="npu"), torch.empty(1000).pin_memory()
        torch.npu.synchronize()
        with torch.npu.stream(side):
            target.copy_(x[0], non_blocking=True)  # first
        {order}
        target.copy_(x[1], non_blocking=True)  # second
    """,
    "column = 1": """
        x, column = torch.zeros(100, 2, device="npu"), 0
        torch.npu.synchronize()
        {order}
        with torch.npu.stream(side):
            x[:, 0].fill_(1)  # first
        x[:, column].fill_(2)  # second
    """,
    "done.wait()": """
        import os, torch.distributed as dist
        rank, store = int(os.environ["RANK"]), f"file://{{__file__}}.store"
        torch.npu.set_device(rank)
        dist.init_process_group("hccl", init_method=store, rank=rank, world_size=2)
        x = torch.ones(1000, device="npu")
        done = dist.all_reduce(x, async_op=True)  # first
        {order}
        x.mul_(2)  # second
    """,
    "graph.wait_stream(side)": """
        import torchair
        def model(x):  # second
            return x * 2 + 1
        model = torch.compile(model, backend=torchair.get_npu_backend(), dynamic=False)
        x = torch.ones(1000, device="npu")
        model(x)
        graph = torch.npu.current_stream()
        torch.npu.synchronize()
        with torch.npu.stream(side):
            x.fill_(3)  # first
        {order}
        model(x)
    """,
}
ALONE = [order for order in ORDERED if order != "done.wait()"]  # one process is enough for them


def program(order: str, *, is_there: bool) -> str:
    return textwrap.dedent(ORDERED[order]).format(order=order if is_there else "pass")


def write(path: Path, *programs: str) -> Path:
    path.write_text(START + "torch.npu.synchronize()\n".join(programs), encoding="utf-8")
    return path


def start(path: Path, **variables: str) -> subprocess.Popen[str]:
    settings = os.environ | {"CANN_EMULATOR_CHECK_RACES": "1", "TASK_QUEUE_ENABLE": "0"} | variables
    return subprocess.Popen([sys.executable, str(path)], env=settings, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    errors = process.communicate()[1]
    return process.returncode, errors


def site(path: Path, mark: str) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return f"{path}:{next(i for i, line in enumerate(lines, 1) if line.endswith(mark))}\n"


def assert_found(path: Path, result: tuple[int, str]) -> None:
    code, errors = result
    assert code == RACES, errors[-3000:]
    assert site(path, "# first") in errors and site(path, "# second") in errors, errors[-3000:]
    assert "[CANN emulator] 1 race\n" in errors, errors[-3000:]


@pytest.fixture(scope="module")
def unordered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("unordered")
    paths = [write(folder / f"{number}.py", program(order, is_there=False)) for number, order in enumerate(ALONE)]
    checked = environment(CANN_EMULATOR_CHECK_RACES="1", TASK_QUEUE_ENABLE="0")
    done = run_forked([([path], {}) for path in paths], ["torch_npu"], checked)
    return dict(zip(ALONE, done, strict=True))


@pytest.mark.parametrize("order", ALONE)
def test_what_nothing_orders_is_found_with_both_lines(
    unordered: dict[str, subprocess.CompletedProcess[str]], order: str
) -> None:
    done = unordered[order]
    assert_found(Path(done.args[0]), (done.returncode, done.stderr))


@pytest.mark.parametrize("asynchronous", ["0", "1"])
def test_what_is_ordered_is_clean(asynchronous: str, tmp_path: Path) -> None:
    path = write(tmp_path / "program.py", *(program(order, is_there=True) for order in ALONE))
    code, errors = finish(start(path, CANN_EMULATOR_ASYNC=asynchronous))
    assert code == 0 and "race" not in errors, errors[-3000:]


def test_the_option_and_streams_that_run_behind_the_program(chip: str, tmp_path: Path) -> None:
    path = write(tmp_path / "program.py", program("current.wait_stream(side)", is_there=False))
    options = ["--soc", chip, "--check-races", "--asynchronous"]
    command = [sys.executable, "-m", "emulator", "run", *options, "--", sys.executable, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert_found(path, (done.returncode, done.stderr))


def test_a_pair_is_reported_once_and_an_exit_code_of_the_programs_own_stays(tmp_path: Path) -> None:
    racing = textwrap.indent(program("current.wait_stream(side)", is_there=False), "    ")
    path = write(tmp_path / "program.py", f"for _ in range(3):{racing}\nraise SystemExit(5)\n")
    code, errors = finish(start(path))
    assert code == 5
    assert errors.count("[CANN emulator] race in memory of device 0") == 1
    code, errors = finish(start(path, CANN_EMULATOR_CHECK_RACES="0"))
    assert code == 5 and "race" not in errors, "without the option nothing is said"


@pytest.mark.parametrize("is_there", [False, True])
def test_a_collective_that_nobody_waits_for(is_there: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "program.py", program("done.wait()", is_there=is_there))
    ranks = [start(path, RANK=str(rank), CANN_EMULATOR_DEVICES="2") for rank in range(2)]
    for result in [finish(rank) for rank in ranks]:
        if is_there:
            assert result[0] == 0 and "race" not in result[1], result[1][-3000:]
        else:
            assert_found(path, result)
