"""A streamed model takes one call at a time, and whoever makes a second is told."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch

from ascend.streaming import Buffers, lend_module, stream_module
from ascend.streaming.turns import Turns
from tests.ascend.streaming.test_stream import CPU, ERRORS, Transformer, X


def meanwhile(model: Transformer, call: Callable[[], object]) -> list[object]:
    """What `call` gives, or raises, in another thread while the third block of `model` computes."""
    found: list[object] = []

    def work() -> None:
        try:
            found.append(call())
        except RuntimeError as error:
            found.append(error)

    def run_and_wait(*_: object) -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    handle = model.blocks[2].linear.register_forward_hook(run_and_wait)
    with torch.no_grad():
        found.insert(0, model(X))
    handle.remove()
    return found


def make_two(share: bool = True) -> tuple[Transformer, Transformer]:
    buffers = Buffers(CPU)
    models = tuple(Transformer().eval().requires_grad_(False) for _ in range(2))
    for model in models:
        stream_module(model, CPU, buffers if share else None)
    return models


@pytest.mark.parametrize("way", ["streamed", "lent", "shared buffers"])
def test_a_call_of_another_thread_is_refused_and_harms_nothing(way: str) -> None:
    expected = Transformer()(X)
    first, second = make_two() if way == "shared buffers" else (Transformer().requires_grad_(False),) * 2
    if way == "streamed":
        stream_module(first, CPU)
    elif way == "lent":
        lend_module(first, CPU)
    result, error = meanwhile(first, lambda: second(X))
    assert torch.equal(result, expected)
    assert isinstance(error, RuntimeError) and "another thread computes Transformer in the same memory" in str(error)
    assert torch.equal(second(X), expected) and torch.equal(first(X), expected)


def test_models_with_buffers_of_their_own_run_at_once() -> None:
    first, second = make_two(share=False)
    results = meanwhile(first, lambda: second(X))
    assert all(torch.equal(result, Transformer()(X)) for result in results)


@pytest.mark.parametrize("is_same", [True, False])
def test_a_call_within_a_call_is_refused(is_same: bool) -> None:
    first, second = make_two()
    handle = first.blocks[2].linear.register_forward_hook(lambda *_: None if is_same and entered() else again(X))
    again = first if is_same else second
    entries = iter(range(9))

    def entered() -> bool:
        return next(entries) > 0

    with pytest.raises(RuntimeError, match="this thread computes Transformer in the same memory"):
        first(X)
    handle.remove()
    for model in (first, second):
        assert torch.equal(model(X), Transformer()(X))


@pytest.mark.parametrize("error", ERRORS)
def test_the_turn_ends_however_the_call_does(error: type[BaseException]) -> None:
    def fail(*_: object) -> None:
        raise error

    first, second = make_two()
    third = Transformer().requires_grad_(False)
    loan = lend_module(third, CPU)
    for model in (first, third):
        handle = model.blocks[2].register_forward_hook(fail)
        with pytest.raises(error):
            model(X)
        handle.remove()
    assert not first._hf_hook.buffers.turns.calls and not loan.turns.calls
    for model in (second, first, third):
        assert torch.equal(model(X), Transformer()(X))


def test_the_turn_ends_when_a_call_is_refused_for_its_gradients() -> None:
    first, second = make_two()
    first.requires_grad_(True)
    with pytest.raises(RuntimeError, match="is streamed: its weights are gone"):
        first(X)
    assert torch.equal(second(X), Transformer()(X))


def test_interrupts_at_any_moment_leave_no_turn_taken() -> None:
    turns = Turns()
    before = signal.signal(signal.SIGVTALRM, signal.default_int_handler)
    try:
        for _ in range(100):
            with suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_VIRTUAL, 1e-6)  # once, after computing, in steps of the system's clock
                while True:
                    turns.take("model", sum_up, sum_up)
            assert not turns.calls
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def sum_up() -> int:
    return sum((1, 2))
