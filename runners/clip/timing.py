"""How long a call takes, measured so that the numbers mean something."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# Of a percentile: so many samples have to lie beyond it, else one outlier decides it.
SAMPLES_BEYOND = 5


def measure(
    call: Callable[[], object], synchronize: Callable[[], None], runs: int, warmup: int
) -> tuple[list[float], float | None]:
    """Seconds of `runs` calls, each from an idle device until its results are there, and of the very first call.

    The first of the `warmup` calls loads kernels and makes graphs; it is None without warm-up.
    """
    first = None
    for number in range(warmup):
        seconds = _time(call, synchronize)
        first = seconds if number == 0 else first
    return [_time(call, synchronize) for _ in range(runs)], first


def _time(call: Callable[[], object], synchronize: Callable[[], None]) -> float:
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def statistics(seconds: Sequence[float], items: int = 1) -> dict[str, Any]:
    """Milliseconds of a call, and of `items` in each how many there are in a second.

    `percentiles_trusted` are those that enough samples lie beyond: the others say little.
    """
    samples = np.array(seconds) * 1000
    shares = {f"p{share}_ms": share for share in (50, 95, 99)}
    return {
        "mean_ms": float(samples.mean()),
        "std_ms": float(samples.std()),
        "min_ms": float(samples.min()),
        "max_ms": float(samples.max()),
        **{name: float(np.percentile(samples, share)) for name, share in shares.items()},
        "throughput_per_sec": items * 1000 / float(samples.mean()),
        "percentiles_trusted": [
            name for name, share in shares.items() if len(samples) * (100 - share) >= 100 * SAMPLES_BEYOND
        ],
    }
