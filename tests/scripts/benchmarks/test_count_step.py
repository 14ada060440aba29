"""The table of steps has the calibrated time of each, and says what it is."""

from __future__ import annotations

from emulator import calibration, profile
from scripts.benchmarks.count_step import COLUMNS, format_results


def test_the_table_has_the_calibrated_time() -> None:
    factor = calibration.factor_of(profile.load("Ascend310P3"))
    counts: dict[str, float | None] = {**dict.fromkeys(COLUMNS, 1), "TransData": None, "estimated ms": 100.0}
    _, _, row, *said = format_results({"FA": {"full": counts}}, "Ascend310P3", factor).splitlines()
    middle, low, high = factor.estimate(100.0)
    assert row.endswith(f"| 100.0 | {middle:.1f} ({low:.1f} to {high:.1f}) |")
    assert said[-1] == f"calibrated ms: {factor.label()}"
