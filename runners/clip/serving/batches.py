"""Puts together what many tasks want computed at about the same time.

Ray Serve's `@serve.batch` does so in a replica, to which each input travels by a call of its own: of a small model
that costs more than computing it. Here one call takes a whole batch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batches(Generic[Item, Result]):
    """An awaitable call for one item, which is computed together with others.

    Args:
        compute: the results of a list of items, in their order.
        size: most items of a batch.
        wait_seconds: that the first item of a batch waits for others, where there is room for a batch at once.
        at_once: batches that are computed at a time; what comes meanwhile fills the next ones.
    """

    def __init__(
        self,
        compute: Callable[[list[Item]], Awaitable[Sequence[Result]]],
        size: int,
        wait_seconds: float,
        at_once: int,
    ) -> None:
        self.compute, self.size, self.wait_seconds = compute, size, wait_seconds
        self.room = asyncio.Semaphore(at_once)
        self.waiting: asyncio.Queue[tuple[Item, asyncio.Future[Result]]] = asyncio.Queue()
        self.tasks: set[asyncio.Task[Any]] = set()  # else nobody would hold them

    async def __call__(self, item: Item) -> Result:
        """Raises what `compute` raised for the batch."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self.waiting.put_nowait((item, future))
        if not self.tasks:
            self._start(self._collect())
        return await future

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _collect(self) -> None:
        while True:
            batch = [await self.waiting.get()]
            await self.room.acquire()
            deadline = asyncio.get_running_loop().time() + self.wait_seconds
            while len(batch) < self.size and (following := await self._next(deadline)):
                batch.append(following)
            self._start(self._answer([(item, future) for item, future in batch if not future.done()]))

    async def _next(self, deadline: float) -> tuple[Item, asyncio.Future[Result]] | None:
        """None: nothing has come until then."""
        left = deadline - asyncio.get_running_loop().time()
        if not self.waiting.empty():
            return self.waiting.get_nowait()
        if left <= 0:
            return None
        try:
            return await asyncio.wait_for(self.waiting.get(), left)
        except TimeoutError:
            return None

    async def _answer(self, batch: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        try:
            results = await self.compute([item for item, _ in batch]) if batch else []
        except Exception as error:  # of any kind: it is theirs who wait
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
        else:
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)
        finally:
            self.room.release()
