"""The drawing of a graph."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from emulator import EmulatorError, drawing, profile

CHIP = profile.load("Ascend310P3")
SVG = "{http://www.w3.org/2000/svg}"


def step(operator: str, reads: list[int], writes: list[int]) -> dict:
    return {
        "operator": operator,
        "fx": f"{operator.lower()}_1-aten.{operator}.OUTPUT",
        "reads": reads,
        "writes": writes,
    }


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Two graphs: x * 2 + x of a <b> product, and a lone copy; both ran twice."""
    steps = {
        "big": [step("MatMul", [0], [1]), step("Muls", [1], [2]), step("Cast", [2], [3]), step("Add", [3, 1], [4])],
        "small": [step("TensorMove", [0], [1])],
    }
    events = [{"event": "compile", "graph": name, "launches": len(s), "steps": s} for name, s in steps.items()]
    for _ in range(2):
        for name, those in steps.items():
            tensors = [{"name": "x", "shape": [2, 3], "dtype": "float16", "format": "ND"}]
            tensors += [{"name": "<y>", "shape": [4, 5], "dtype": "float32", "format": "ND"}]
            launch = {"event": "launch", "graph": name, "tensors": tensors, "flops": 0, "bytes": 204_000}
            events += [{**launch, "operator": one["operator"]} for one in those]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, events)))
    return path


def test_rows_are_the_launches_of_one_run(trace: Path) -> None:
    name, rows = drawing.rows_of(trace, None, CHIP)
    assert name == "big"
    assert [row.operator for row in rows] == ["MatMul", "Muls", "Cast", "Add"]
    assert rows[0].cells() == ("MatMul", "matmul_1", "4x5 float32", "0.204", "0.000", "1.0")  # at 204 GB/s
    assert drawing.format_table(rows).splitlines()[4].split()[:3] == ["4", "Add", "add_1"]
    assert len(drawing.rows_of(trace, "small", CHIP)[1]) == 1


def test_an_unknown_graph_names_the_others(trace: Path) -> None:
    with pytest.raises(EmulatorError, match="no graph huge that ran; there are: big, small"):
        drawing.rows_of(trace, "huge", CHIP)


def test_tensors_that_live_at_once_have_lanes_of_their_own(trace: Path) -> None:
    lines = drawing.assign_lanes(drawing.rows_of(trace, None, CHIP)[1])
    assert [(line.value, line.lane, line.rows) for line in lines] == [
        (1, 0, [0, 1, 3]),
        (2, 1, [1, 2]),
        (3, 1, [2, 3]),
    ]


def test_the_drawing_is_svg_with_a_bar_for_each_launch(trace: Path) -> None:
    root = ElementTree.fromstring(drawing.draw_svg("a < b", drawing.rows_of(trace, None, CHIP)[1]))
    texts = [element.text or "" for element in root.iter(f"{SVG}text")]
    assert "a < b: 4 launches, 0.004 ms estimated" in texts
    bars = [element for element in root.iter(f"{SVG}rect") if element.get("x")]
    assert [bar.get("fill") == drawing.COLOURS["conversion"] for bar in bars] == [False, False, True, False]
