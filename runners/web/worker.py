"""The one thread that computes for all who use the page: one model at a time, one job after the other."""

from __future__ import annotations

import contextvars
import gc
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch

from ascend.device import DeviceManager
from runners.cli import UserError, is_out_of_memory

Loaded = TypeVar("Loaded")
Loads = TypeVar("Loads", covariant=True)
Result = TypeVar("Result")
OnStep = Callable[[int, int], None]  # takes how many steps are done, and of how many

OUT_OF_MEMORY = (
    "out of memory: a smaller picture needs less, and so does the page when it is started with --memory stream"
)


class Cancelled(Exception):
    """The person who asked for it does not want it any more."""


class Model(Protocol[Loads]):
    """What a worker can load; `name` tells it from others."""

    @property
    def name(self) -> str: ...

    def load(self) -> Loads: ...


class Worker:
    """Loads models and uses them, on a thread of its own: accelerators have a current device for each thread.

    Only the model that was used last is loaded, so that each may have all the memory there is.
    """

    def __init__(self, manager: DeviceManager) -> None:
        self.manager = manager
        self.loaded_name: str | None = None
        self.is_busy = False
        self._loaded: Any = None
        self._wanted: defaultdict[str, set[threading.Event]] = defaultdict(set)  # set: no longer wanted
        self._thread = ThreadPoolExecutor(1, "worker", initializer=self._choose_device)

    def run(
        self, owner: str, model: Model[Loaded], work: Callable[[Loaded, OnStep], Result], progress: OnStep
    ) -> Result:
        """What `work(loaded model, on_step)` returns; it is to call `on_step` after each step of the model.

        Args:
            owner: by whom `cancel` finds the job.
            progress: called with the same arguments, on the worker's thread in the caller's context.

        Raises:
            Cancelled: `cancel(owner)` was called meanwhile. The job ended with the step it was in.
            UserError: the model cannot be loaded, or memory ran out.
        """
        with self._job_of(owner) as unwanted:
            pace = _Pace(self.manager.device)

            def on_step(step: int, steps: int) -> None:
                pace.wait()
                if unwanted.is_set():
                    raise Cancelled
                progress(step, steps)

            context = contextvars.copy_context()
            return self._thread.submit(context.run, self._run, model, work, on_step, unwanted).result()

    @contextmanager
    def request(self, owner: str) -> Iterator[Callable[[], None]]:
        """Several jobs that `cancel(owner)` ends together, also between them.

        What it gives is to be called between jobs, and raises Cancelled where they are no longer wanted.
        """
        with self._job_of(owner) as unwanted:

            def go_on() -> None:
                if unwanted.is_set():
                    raise Cancelled

            yield go_on

    def cancel(self, owner: str) -> int:
        """End what `owner` has running and waiting here. The result is how many jobs that are."""
        jobs = tuple(self._wanted.get(owner, ()))
        for unwanted in jobs:
            unwanted.set()
        return len(jobs)

    def close(self) -> None:
        """End all jobs and free the model."""
        for owner in tuple(self._wanted):
            self.cancel(owner)
        self._thread.submit(self._release)
        self._thread.shutdown()

    @contextmanager
    def _job_of(self, owner: str) -> Iterator[threading.Event]:
        unwanted = threading.Event()
        self._wanted[owner].add(unwanted)
        try:
            yield unwanted
        finally:
            self._wanted[owner].discard(unwanted)
            if not self._wanted[owner]:
                del self._wanted[owner]

    def _run(
        self,
        model: Model[Loaded],
        work: Callable[[Loaded, OnStep], Result],
        on_step: OnStep,
        unwanted: threading.Event,
    ) -> Result:
        self.is_busy = True
        try:
            if unwanted.is_set():
                raise Cancelled
            return work(self._load(model), on_step)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        finally:
            self.is_busy = False
        # Outside the handler, as the error holds the tensors of the frames that it went through.
        self._give_back()
        raise UserError(OUT_OF_MEMORY)

    def _load(self, model: Model[Loaded]) -> Loaded:
        if self.loaded_name != model.name:
            self._release()
            self._loaded = model.load()
            self.loaded_name = model.name
        return self._loaded

    def _release(self) -> None:
        self.loaded_name = self._loaded = None
        self._give_back()

    def _give_back(self) -> None:
        gc.collect()  # modules and hooks refer to each other
        self.manager.empty_cache()

    def _choose_device(self) -> None:
        if self.manager.device.type != "cpu":
            torch.accelerator.set_device_index(self.manager.device.index)


class _Pace:
    """Keeps the host at most a step ahead of its device, so that progress is the device's, and cancelling soon."""

    def __init__(self, device: torch.device) -> None:
        self._events = None if device.type == "cpu" else torch.get_device_module(device).Event
        self._last: Any = None

    def wait(self) -> None:
        if self._events is None:
            return
        if self._last is not None:
            self._last.synchronize()
        self._last = self._events()
        self._last.record()
