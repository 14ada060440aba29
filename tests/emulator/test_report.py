"""The summary of a trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emulator import EmulatorError, calibration, profile, report


def launch(operator: str, flops: int, size: int, dtype: str = "float16") -> str:
    tensors = [{"name": "self", "shape": [2, 3], "dtype": dtype, "format": "ND"}]
    event = {"event": "launch", "operator": operator, "tensors": tensors, "bytes": size, "flops": flops}
    return json.dumps({**event, "attributes": {}, "microseconds": 1000, "device": 0, "stream": 0})


def test_totals_and_estimates(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    copy = json.dumps({"event": "copy", "kind": "host_to_device", "bytes": 3_000_000, "device": 0, "stream": 0})
    wait = json.dumps({"event": "sync", "of": "stream", "device": 0, "stream": 0})
    slow = launch("Matmul", flops=70 * 10**12, size=1000)  # a second at the 70 TFLOPS of a 310P
    lines = [slow, launch("Add", 0, 204 * 10**6), launch("Add", 0, 204 * 10**6), launch("Identity", 0, 8), copy, wait]
    trace.write_text("\n".join(lines))
    lines = report.summarise(trace, profile.load("Ascend310P3")).splitlines()
    assert lines[1].split()[:3] == ["Matmul", "1", "70000.000"]
    assert lines[1].split()[-1] == "1000.000"
    assert lines[2].split()[:2] == ["Add", "2"]
    assert lines[2].split()[-1] == "2.000"  # at 204 GB/s
    text = "\n".join(lines)
    assert "format conversions: 1" in text
    assert "waits of the host: 1" in text
    assert "copies host_to_device: 1 of 3.00 MB" in text
    assert "estimate" in lines[-1]


def test_the_sum_is_calibrated(tmp_path: Path) -> None:
    chip = profile.load("Ascend310P3")
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join([launch("Matmul", 70 * 10**12, 1000), launch("Add", 0, 204 * 10**9)]))
    text = report.summarise(trace, chip)
    estimate = calibration.factor_of(chip).estimate(2000.0)
    assert "all launches: 2,000.00 ms at the nominal speed and bandwidth of Ascend310P3; " in text
    assert f"{estimate.middle:,.2f} ({estimate.low:,.2f} to {estimate.high:,.2f}) ms calibrated: an estimate" in text


@pytest.mark.parametrize(("chip", "random"), [("Ascend310P3", 1), ("Ascend910B3", 0)])
def test_launches_on_the_ai_cpu_are_counted_by_operator_and_dtype(tmp_path: Path, chip: str, random: int) -> None:
    trace = tmp_path / "trace.jsonl"
    operators = [
        ("ScatterElements", "int64"),
        ("ScatterElements", "float16"),
        ("Scatter", "int64"),
        ("Mul", "float16"),
    ]
    operators += [("ScatterElements", "int64"), ("InplaceNormal", "float16"), ("NobodyKnows", "float64")]
    trace.write_text("\n".join(launch(operator, 0, 8, dtype) for operator, dtype in operators))
    text = report.summarise(trace, profile.load(chip))
    normal = ", 1 InplaceNormal of float16" if random else ""
    expected = f"AI CPU: {3 + random} (2 ScatterElements of int64, 1 Scatter of int64{normal})\n"
    assert f"launches known to run on the {expected}" in text


def test_what_is_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("hello")
    with pytest.raises(EmulatorError, match="line 1, is no line of a trace"):
        report.summarise(path, profile.load("Ascend310P3"))
