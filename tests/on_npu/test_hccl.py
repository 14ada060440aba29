"""torch.distributed with backend="hccl" between processes that have a chip each."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.on_npu import hccl_ranks
from tests.on_npu.hccl_ranks import COUNT, MOVED, MOVES, REDUCED, REDUCING, REDUCTIONS, Results, values
from tests.on_npu.helpers import SATURATES, reference
from tests.on_npu.ranks import run_ranks, whole

EMULATED = "CANN_EMULATOR_SOC" in os.environ
SIZE = 3
pytestmark = pytest.mark.skipif(not EMULATED and torch.npu.device_count() < SIZE, reason=f"needs {SIZE} chips")
emulated = pytest.mark.skipif(not EMULATED, reason="of the emulator")

REFUSAL = "error code is 5"
COPYING = ("all_gather", "all_gather_uneven", "all_to_all_uneven", "scatter")
NOT_ON_310P = ("broadcast", "send_and_recv", "ring", "scatter")


def run(program: str, size: int, directory: Path, **environment: str) -> list[Results | None]:
    return run_ranks(hccl_ranks.__file__, program, size, directory, CANN_EMULATOR_DEVICES=str(SIZE), **environment)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    directory = tmp_path_factory.mktemp("hccl")
    return whole(run("collectives", SIZE, directory), directory)


def expected_move(name: str, dtype: torch.dtype, rank: int) -> Any:
    sent = [values(r, dtype) for r in range(SIZE)]
    piece = slice(rank * COUNT // SIZE, (rank + 1) * COUNT // SIZE)
    return {
        "all_gather": sent,
        "all_gather_into_tensor": torch.cat(sent),
        "all_gather_uneven": [values(r, dtype, r + 1) for r in range(SIZE)],
        "all_to_all_single": torch.cat([x[piece] for x in sent]),
        "all_to_all_uneven": [x[: rank + 1] for x in sent],
        "broadcast": sent[1],
        "send_and_recv": sent[0] if rank < 2 else None,
        "ring": sent[(rank - 1) % SIZE],
        "scatter": values(10 + rank, dtype),
    }[name]


def refuses_move(name: str, dtype: torch.dtype) -> bool:
    return SATURATES and (name in NOT_ON_310P or dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", MOVED, ids=str)
@pytest.mark.parametrize("name", MOVES)
def test_what_moves_values(results: list[Results], name: str, dtype: torch.dtype) -> None:
    for rank, result in enumerate(results):
        actual = result[name, str(dtype)]
        expected = expected_move(name, dtype, rank)
        if expected is None:
            assert actual is None
        elif refuses_move(name, dtype):
            copies = dtype == torch.bfloat16 and name in COPYING  # an operator of torch_npu's is refused first
            assert isinstance(actual, str) and (REFUSAL in actual or copies), actual
        else:
            assert not isinstance(actual, str), actual
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def expected_reduction(name: str, dtype: torch.dtype, operation: str, rank: int) -> torch.Tensor | None:
    """In the order of the ranks; 16-bit sums in float32 and rounded once."""
    sent = [reference(values(r, dtype)) for r in range(SIZE)]
    combine = {"sum": torch.add, "prod": torch.mul, "max": torch.maximum, "min": torch.minimum}[operation]
    total = functools.reduce(combine, sent).to(dtype)
    pieces = {
        "all_reduce": total,
        "reduce": total if rank == 0 else None,
        "reduce_scatter_tensor": total.reshape(SIZE, -1)[rank],
        "reduce_scatter_uneven": total[: rank + 1],
    }
    return pieces[name]


def refuses_reduction(name: str, dtype: torch.dtype, operation: str) -> bool:
    if not SATURATES and name.endswith("uneven"):
        return operation == "prod" or dtype == torch.int64
    if not SATURATES:
        return operation == "prod" and dtype in (torch.int16, torch.bfloat16)
    if name == "reduce" or dtype in (torch.bfloat16, torch.int64):
        return True
    if name.endswith("uneven"):
        return operation != "sum" or dtype in (torch.int8, torch.int32)
    return dtype == torch.int16 and operation != "sum"


@pytest.mark.parametrize("operation", REDUCTIONS)
@pytest.mark.parametrize("dtype", REDUCED, ids=str)
@pytest.mark.parametrize("name", REDUCING)
def test_reductions(results: list[Results], name: str, dtype: torch.dtype, operation: str) -> None:
    for rank, result in enumerate(results):
        actual = result[f"{name} {operation}", str(dtype)]
        if refuses_reduction(name, dtype, operation):
            assert isinstance(actual, str), actual
            assert REFUSAL in actual or dtype == torch.bfloat16, actual
            continue
        assert not isinstance(actual, str), actual
        expected = expected_reduction(name, dtype, operation, rank)
        if expected is None:
            assert actual is None
        elif EMULATED:
            assert torch.equal(actual, expected), (actual, expected)
        else:
            torch.testing.assert_close(actual, expected)


@emulated
@pytest.mark.skipif(not SATURATES, reason="of 310P")
def test_a_refusal_says_what_hccl_says(results: list[Results]) -> None:
    error = results[0]["all_reduce sum", "torch.int64"]
    assert "EI0003: In [HcclAllReduce], value [int64] for parameter [dataType] is invalid" in error
    assert "HcclBroadcast on Ascend310P3" in results[0]["broadcast", "torch.float32"]


def test_two_groups_at_once(results: list[Results]) -> None:
    for rank, result in enumerate(results):
        ours, theirs = result["groups", ""]
        assert ours.tolist() == [1.0 if rank < 2 else rank] * 3  # 0 + 1
        assert theirs.tolist() == [3.0 if rank > 0 else rank] * 3  # 1 + 2
        assert result["completed", ""]


def test_a_barrier_holds_all_until_the_last(results: list[Results]) -> None:
    came, left = ([result[f"{side} the barrier", ""] for result in results] for side in ("before", "after"))
    assert min(left) >= max(came)


def test_objects(results: list[Results]) -> None:
    assert all(result["objects", ""] == [{"rank": rank} for rank in range(SIZE)] for result in results)


@emulated
def test_ranks_that_disagree(results: list[Results]) -> None:
    for result in results:
        assert "EI0005" in result["mismatch", ""] and "parameter [count]" in result["mismatch", ""]


@emulated
def test_streams_on_threads_and_a_second_life(tmp_path: Path) -> None:
    results = whole(run("again", 2, tmp_path, CANN_EMULATOR_ASYNC="1", TASK_QUEUE_ENABLE="1"), tmp_path)
    assert [result["again", ""].tolist() for result in results] == [[4.0, 4.0]] * 2


@emulated
def test_a_killed_rank_is_seen_at_once_and_leaves_nothing_behind(tmp_path: Path) -> None:
    before = sorted(os.listdir("/dev/shm"))
    results = run("lost", SIZE, tmp_path)
    assert results[-1] is None
    for result in results[:-1]:
        assert result is not None, (tmp_path / "output").read_text()[-4000:]
        assert "EI0002" in result["error", ""] and "error code is 21" in result["error", ""]
    assert sorted(os.listdir("/dev/shm")) == before


@emulated
def test_a_killed_rank_ends_streams_on_threads(tmp_path: Path) -> None:
    results = run("lost", 2, tmp_path, CANN_EMULATOR_ASYNC="1", TASK_QUEUE_ENABLE="1")
    # torch_npu's watchdog asks each second, and may end the process first.
    output = (tmp_path / "output").read_text() if results[0] is None else results[0]["error", ""]
    assert "EI0002" in output and "remote rank: [1] is gone" in output


@emulated
def test_a_rank_that_is_late(tmp_path: Path) -> None:
    results = run("late", 2, tmp_path, HCCL_EXEC_TIMEOUT="2")
    assert results[0] is not None
    assert results[0]["seconds", ""] >= 2
    assert "EI0002" in results[0]["error", ""] and "sent nothing for 2 s" in results[0]["error", ""]


@emulated
def test_two_ranks_on_one_device(tmp_path: Path) -> None:
    for result in whole(run("same_device", 2, tmp_path), tmp_path):
        assert "rank [0] and rank [1] have the same device id [0]" in result["error", ""]


@emulated
def test_ranks_that_see_one_device_each_are_on_different_ones(tmp_path: Path) -> None:
    for result in whole(run("one_each", SIZE, tmp_path), tmp_path):
        assert result["devices", ""] == 1
        assert result["error", ""].tolist() == [SIZE, SIZE], result["error", ""]
