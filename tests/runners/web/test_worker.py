"""The thread that computes for all who use the page."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ascend.device import DeviceManager
from runners.cli import UserError
from runners.web.worker import Cancelled, OnStep, Worker


class Weights:
    pass


class Made:
    """A model that remembers the weights that it loaded."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.loads: list[weakref.ref[Weights]] = []

    def load(self) -> Weights:
        weights = Weights()
        self.loads.append(weakref.ref(weights))
        return weights


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker(DeviceManager("cpu"))
    yield made
    made.close()


def ignore(step: int, steps: int) -> None:
    pass


def two_steps(loaded: Any, on_step: OnStep) -> str:
    on_step(1, 2)
    on_step(2, 2)
    return "done"


def test_progress_is_seen_and_a_model_is_loaded_once(worker: Worker) -> None:
    model, seen = Made("a"), []
    for _ in range(2):
        assert worker.run("me", model, two_steps, lambda step, steps: seen.append((step, steps))) == "done"
    assert seen == [(1, 2), (2, 2)] * 2 and len(model.loads) == 1
    assert worker.loaded_name == "a" and not worker.is_busy


def test_one_model_at_a_time_is_in_memory() -> None:
    worker, one, other = Worker(DeviceManager("cpu")), Made("a"), Made("b")
    for model in (one, other, one):
        worker.run("me", model, two_steps, ignore)
        gc.collect()
        assert [ref() is not None for made in (one, other) for ref in made.loads].count(True) == 1
    worker.close()
    gc.collect()
    assert all(ref() is None for ref in one.loads + other.loads)


def test_cancelling_ends_the_owners_job_with_its_step_and_no_other(worker: Worker) -> None:
    stepped, cancelled, steps = threading.Event(), threading.Event(), []

    def long_job(loaded: Any, on_step: OnStep) -> None:
        for step in range(1, 100):
            on_step(step, 99)
            steps.append(step)
            stepped.set()
            assert cancelled.wait(60)

    with ThreadPoolExecutor() as people:
        mine = people.submit(worker.run, "me", Made("a"), long_job, ignore)
        assert stepped.wait(60)
        theirs = people.submit(worker.run, "they", Made("a"), two_steps, ignore)
        waiting = people.submit(worker.run, "me", Made("a"), two_steps, ignore)
        while worker.cancel("me") < 2:
            pass
        cancelled.set()
        for job in (mine, waiting):
            with pytest.raises(Cancelled):
                job.result(60)
        assert theirs.result(60) == "done" and steps == [1]
    assert worker.run("me", Made("a"), two_steps, ignore) == "done"


def test_cancelling_between_two_jobs_of_a_request_ends_it(worker: Worker) -> None:
    with worker.request("me") as go_on:
        go_on()
        worker.run("me", Made("a"), two_steps, ignore)
        assert worker.cancel("they") == 0
        go_on()
        assert worker.cancel("me") == 1
        with pytest.raises(Cancelled):
            go_on()
    with worker.request("me") as go_on:
        go_on()  # the next one is wanted


def test_what_ran_out_of_memory_is_freed_and_said(worker: Worker) -> None:
    held: list[weakref.ref[Weights]] = []

    def greedy(loaded: Any, on_step: OnStep) -> None:
        tensor = Weights()
        held.append(weakref.ref(tensor))
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")

    with pytest.raises(UserError, match="out of memory: a smaller picture"):
        worker.run("me", Made("a"), greedy, ignore)
    assert held[0]() is None and worker.run("me", Made("a"), two_steps, ignore) == "done"


def test_a_bug_stays_a_bug_and_a_model_that_cannot_be_loaded_is_tried_again(worker: Worker) -> None:
    def buggy(loaded: Any, on_step: OnStep) -> None:
        raise KeyError("a bug")

    class Absent(Made):
        def load(self) -> Weights:
            raise UserError("no such file")

    with pytest.raises(KeyError):
        worker.run("me", Made("a"), buggy, ignore)
    for _ in range(2):
        with pytest.raises(UserError, match="no such file"):
            worker.run("me", Absent("b"), two_steps, ignore)
    assert worker.loaded_name is None and worker.run("me", Made("a"), two_steps, ignore) == "done"
