"""What is put together, and that everybody gets his own result."""

from __future__ import annotations

import asyncio

import pytest

from runners.clip.serving.batches import Batches

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Doubler:
    """Of numbers; waits until it is `free`, and fails for what is 13."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.free = asyncio.Event()

    async def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        await self.free.wait()
        if 13 in items:
            raise ValueError("13")
        return [2 * item for item in items]


async def test_what_comes_while_a_batch_computes_is_the_next_one() -> None:
    compute = Doubler()
    double = Batches(compute, size=4, wait_seconds=0.0, at_once=1)
    tasks = [asyncio.create_task(double(0))]
    while not compute.batches:
        await asyncio.sleep(0)
    tasks += [asyncio.create_task(double(number)) for number in range(1, 8)]
    await asyncio.sleep(0)
    compute.free.set()
    assert await asyncio.gather(*tasks) == [2 * number for number in range(8)]
    assert compute.batches == [[0], [1, 2, 3, 4], [5, 6, 7]]


async def test_without_batches_each_is_computed_by_itself() -> None:
    compute = Doubler()
    compute.free.set()
    double = Batches(compute, size=1, wait_seconds=0.0, at_once=2)
    assert await asyncio.gather(*map(double, range(5))) == [0, 2, 4, 6, 8]
    assert compute.batches == [[0], [1], [2], [3], [4]]


async def test_a_batch_that_fails_fails_for_its_own_items_and_no_others() -> None:
    compute = Doubler()
    compute.free.set()
    double = Batches(compute, size=2, wait_seconds=0.0, at_once=1)
    results = await asyncio.gather(*map(double, (1, 2, 13, 4, 5)), return_exceptions=True)
    assert [str(result) for result in results] == ["2", "4", "13", "13", "10"]
    assert await double(3) == 6, "goes on"


async def test_who_waits_no_more_is_not_computed() -> None:
    compute = Doubler()
    double = Batches(compute, size=4, wait_seconds=0.0, at_once=1)
    first = asyncio.create_task(double(0))
    while not compute.batches:
        await asyncio.sleep(0)
    second, third = asyncio.create_task(double(1)), asyncio.create_task(double(2))
    await asyncio.sleep(0)
    second.cancel()
    compute.free.set()
    assert await first == 0 and await third == 4
    assert compute.batches == [[0], [2]]
