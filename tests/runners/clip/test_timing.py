"""Numbers that mean something: what is between the two looks at the clock, and which percentiles can be trusted."""

import time

import numpy as np
import pytest

from runners.clip.timing import measure, statistics


def test_the_device_is_idle_before_each_call_and_done_after_it() -> None:
    said: list[str] = []
    seconds, first = measure(lambda: said.append("call"), lambda: said.append("wait"), runs=3, warmup=2)
    assert said == ["wait", "call", "wait"] * 5
    assert len(seconds) == 3 and first is not None
    assert measure(lambda: None, lambda: None, runs=1, warmup=0)[1] is None


def test_the_clock_is_none_that_is_set_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 0.0)
    (seconds,), _ = measure(lambda: sum(range(1000)), lambda: None, runs=1, warmup=0)
    assert seconds > 0


def test_statistics_are_numpys_in_milliseconds() -> None:
    seconds = [0.001 * number for number in range(1, 101)]
    found = statistics(seconds, items=4)
    assert found["p50_ms"] == pytest.approx(50.5) and found["p99_ms"] == pytest.approx(99.01)
    assert found["std_ms"] == pytest.approx(np.std(seconds) * 1000)
    assert found["throughput_per_sec"] == pytest.approx(4000 / 50.5)


@pytest.mark.parametrize("count, trusted", [(5, []), (10, ["p50_ms"]), (100, ["p50_ms", "p95_ms"]), (500, 3)])
def test_a_percentile_needs_samples_beyond_it(count: int, trusted: object) -> None:
    found = statistics([0.001] * count)["percentiles_trusted"]
    assert found == trusted or len(found) == trusted
