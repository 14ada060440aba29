"""The ranks of the programs that `test_hccl.py` starts: python hccl_ranks.py PROGRAM SIZE DIRECTORY.

Each writes what it got to DIRECTORY/RANK.pt: results on the CPU, or the text of the error, by name and dtype. They are
forked after the imports, which take longest, and before anything of the device.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401

from tests.on_npu.inputs import numbers

PATIENCE = 240  # seconds, far longer than a slow machine takes; pytest ends a test after 300
COUNT = 24  # divides by 2 and 3 ranks
MOVED = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool)
REDUCED = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int16, torch.int32, torch.int64)
REDUCTIONS = {
    "sum": dist.ReduceOp.SUM,
    "prod": dist.ReduceOp.PRODUCT,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}

Results = dict[tuple[str, str], Any]
Program = Callable[[int, int], Results]  # of a rank, and of how many


def values(rank: int, dtype: torch.dtype, count: int = COUNT) -> torch.Tensor:
    return numbers((count,), dtype, seed=rank)


class Ranks:
    """The collectives, each from this rank's `values` to what this rank gets."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def mine(self, dtype: torch.dtype, count: int = COUNT) -> torch.Tensor:
        return values(self.rank, dtype, count).to("npu")

    def all_gather(self, dtype: torch.dtype) -> list[torch.Tensor]:
        outputs = [torch.empty(COUNT, dtype=dtype, device="npu") for _ in range(self.size)]
        dist.all_gather(outputs, self.mine(dtype))
        return outputs

    def all_gather_into_tensor(self, dtype: torch.dtype) -> torch.Tensor:
        output = torch.empty(self.size * COUNT, dtype=dtype, device="npu")
        dist.all_gather_into_tensor(output, self.mine(dtype))
        return output

    def all_gather_uneven(self, dtype: torch.dtype) -> list[torch.Tensor]:
        outputs = [torch.empty(rank + 1, dtype=dtype, device="npu") for rank in range(self.size)]
        dist.all_gather(outputs, self.mine(dtype, self.rank + 1))
        return outputs

    def all_to_all_single(self, dtype: torch.dtype) -> torch.Tensor:
        output = torch.empty(COUNT, dtype=dtype, device="npu")
        dist.all_to_all_single(output, self.mine(dtype))
        return output

    def all_to_all_uneven(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Rank r sends s + 1 of its elements to each rank s."""
        inputs = [self.mine(dtype)[: rank + 1].clone() for rank in range(self.size)]
        outputs = [torch.empty(self.rank + 1, dtype=dtype, device="npu") for _ in range(self.size)]
        dist.all_to_all(outputs, inputs)
        return outputs

    def broadcast(self, dtype: torch.dtype) -> torch.Tensor:
        tensor = self.mine(dtype)
        dist.broadcast(tensor, src=1)
        return tensor

    def send_and_recv(self, dtype: torch.dtype) -> torch.Tensor | None:
        """From 0 to 1."""
        if self.rank > 1:
            return None
        tensor = self.mine(dtype)
        if self.rank == 0:
            dist.send(tensor, 1)
        else:
            dist.recv(tensor, 0)
        return tensor

    def ring(self, dtype: torch.dtype) -> torch.Tensor:
        output = torch.empty(COUNT, dtype=dtype, device="npu")
        to, source = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, self.mine(dtype), to), dist.P2POp(dist.irecv, output, source)]
        )
        for work in works:
            work.wait()
        return output

    def scatter(self, dtype: torch.dtype) -> torch.Tensor:
        output = torch.empty(COUNT, dtype=dtype, device="npu")
        inputs = [values(10 + rank, dtype).to("npu") for rank in range(self.size)]
        dist.scatter(output, inputs if self.rank == 0 else None, src=0)
        return output

    def all_reduce(self, dtype: torch.dtype, operation: str) -> torch.Tensor:
        tensor = self.mine(dtype)
        dist.all_reduce(tensor, REDUCTIONS[operation])
        return tensor

    def reduce(self, dtype: torch.dtype, operation: str) -> torch.Tensor | None:
        tensor = self.mine(dtype)
        dist.reduce(tensor, 0, REDUCTIONS[operation])
        return tensor if self.rank == 0 else None

    def reduce_scatter_tensor(self, dtype: torch.dtype, operation: str) -> torch.Tensor:
        output = torch.empty(COUNT // self.size, dtype=dtype, device="npu")
        dist.reduce_scatter_tensor(output, self.mine(dtype), REDUCTIONS[operation])
        return output

    def reduce_scatter_uneven(self, dtype: torch.dtype, operation: str) -> torch.Tensor:
        output = torch.empty(self.rank + 1, dtype=dtype, device="npu")
        pieces = [self.mine(dtype)[: rank + 1].clone() for rank in range(self.size)]
        dist.reduce_scatter(output, pieces, REDUCTIONS[operation])
        return output


MOVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_uneven",
    "all_to_all_single",
    "all_to_all_uneven",
    "broadcast",
    "send_and_recv",
    "ring",
    "scatter",
)
REDUCING = ("all_reduce", "reduce", "reduce_scatter_tensor", "reduce_scatter_uneven")


def to_cpu(result: Any) -> Any:
    return (
        [tensor.cpu() for tensor in result]
        if isinstance(result, list)
        else result.cpu()
        if result is not None
        else None
    )


def attempt(call: Callable[[], Any]) -> Any:
    try:
        return to_cpu(call())
    except (RuntimeError, ValueError) as error:
        return str(error)


def collectives(rank: int, size: int) -> Results:
    ranks = Ranks(rank, size)
    results: Results = {}
    for name in MOVES:
        for dtype in MOVED:
            results[name, str(dtype)] = attempt(lambda name=name, dtype=dtype: getattr(ranks, name)(dtype))
    for name in REDUCING:
        for dtype in REDUCED:
            for operation in REDUCTIONS:
                call = getattr(ranks, name)
                results[f"{name} {operation}", str(dtype)] = attempt(
                    lambda call=call, dtype=dtype, operation=operation: call(dtype, operation)
                )
    return results | groups(rank, size)


def groups(rank: int, size: int) -> Results:
    """What is not about the values: work objects, groups, barriers, and a second life after the end."""
    results: Results = {}
    first, second = dist.new_group([0, 1]), dist.new_group(list(range(1, size)))
    ours, theirs = (torch.full((3,), float(rank), device="npu") for _ in range(2))
    works = []
    if rank < 2:
        works.append(dist.all_reduce(ours, group=first, async_op=True))
    if rank > 0:
        works.append(dist.all_reduce(theirs, group=second, async_op=True))
    for work in works:
        work.wait()
    results["groups", ""] = [ours.cpu(), theirs.cpu()]
    results["completed", ""] = all(work.is_completed() for work in works)

    time.sleep(0.3 * rank)  # so that a barrier that holds nobody is seen
    results["before the barrier", ""] = time.time()
    dist.barrier()
    results["after the barrier", ""] = time.time()
    objects: list[Any] = [None] * size
    dist.all_gather_object(objects, {"rank": rank})
    results["objects", ""] = objects
    results["mismatch", ""] = attempt(lambda: mismatch(rank, size))
    return results


def mismatch(rank: int, size: int) -> torch.Tensor:
    """In a group of its own, as that is of no use afterwards."""
    tensor = torch.ones(4 + rank, device="npu")
    dist.all_reduce(tensor, group=dist.new_group(list(range(size))))
    return tensor


def again(rank: int, size: int) -> Results:
    tensor = torch.ones(2, device="npu")
    dist.all_reduce(tensor)
    dist.destroy_process_group()
    start(f"file://{sys.argv[3]}/store_of_the_second", rank, size)
    dist.all_reduce(tensor)
    torch.npu.synchronize()
    return {("again", ""): tensor.cpu()}


def lost(rank: int, size: int) -> Results:
    """The last rank is killed between two collectives, while a child that it has forked outlives the others' wait."""
    tensor = torch.ones(2, device="npu")
    dist.all_reduce(tensor)
    torch.npu.synchronize()
    if rank == size - 1:
        if os.fork() == 0:
            wait_for_results(range(size - 1))
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    return waited(tensor)


def late(rank: int, size: int) -> Results:
    tensor = torch.ones(2, device="npu")
    dist.all_reduce(tensor)
    torch.npu.synchronize()
    if rank == 1:
        wait_for_results([0])
        return {}
    return waited(tensor)


def wait_for_results(ranks: Iterable[int]) -> None:
    deadline = time.monotonic() + PATIENCE  # nobody else ends a child of a killed rank
    while not all(Path(sys.argv[3], f"{rank}.pt").exists() for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)


def waited(tensor: torch.Tensor) -> Results:
    def reduce() -> torch.Tensor:
        dist.all_reduce(tensor)
        torch.npu.synchronize()
        return tensor

    begin = time.time()
    error = attempt(reduce)
    return {("error", ""): error, ("seconds", ""): time.time() - begin}


def same_device(rank: int, size: int) -> Results:
    torch.npu.set_device(0)
    return waited(torch.ones(2, device="npu"))


def one_each(rank: int, size: int) -> Results:
    """Each process sees one chip, which it calls its device 0."""
    results = waited(torch.ones(2, device="npu"))
    return results | {("devices", ""): torch.npu.device_count()}


def start(store: str, rank: int, size: int) -> None:
    dist.init_process_group("hccl", init_method=store, rank=rank, world_size=size)


def run(program: Program, rank: int, size: int, directory: Path) -> None:
    if program is one_each:  # as Ray and Kubernetes start them
        os.environ["ASCEND_RT_VISIBLE_DEVICES"] = str(rank)
    torch.npu.set_compile_mode(jit_compile=False)
    torch.npu.config.allow_internal_format = False
    torch.npu.set_device(0 if program is one_each else rank)
    start(f"file://{directory}/store", rank, size)
    results = program(rank, size)
    torch.save(results, directory / f"{rank}.pt")
    os._exit(0)  # torch_npu ends a process whose communicator has failed, but not at a certain time


def main(programs: Iterable[Program]) -> None:
    """Runs that of `programs` whose name is the first argument, in a process for each rank."""
    name, size, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    (program,) = (program for program in programs if program.__name__ == name)
    for rank in range(size):
        if os.fork() == 0:
            run(program, rank, size, directory)
    for _ in range(size):
        os.wait()  # how a rank ends is seen by its file


if __name__ == "__main__":
    main((collectives, again, lost, late, same_device, one_each))
