"""The table of step caches."""

from __future__ import annotations

import pytest

from scripts.benchmarks import step_caches


def test_a_row_for_each_setting(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--num_edits", "1", "--steps", "6", "--step_caches", "taylorseer:2"]
    step_caches.main([*arguments, "--refine_strength", "0"])
    table = capsys.readouterr().out.splitlines()
    none, cached = table[-2], table[-1]
    assert none.startswith("no cache") and none.split()[2] == "100"
    assert cached.startswith("taylorseer:2") and float(cached.split()[1]) == pytest.approx(100 * 4 / 6, abs=0.1)
