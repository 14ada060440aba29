"""A compiled graph as a table and as an SVG: a row for each launch, in order, with what it reads and writes.

On the left of the drawing runs a line for each tensor, from the launch that writes it to the last that reads it: as
many lines as a row has, as many tensors are in memory. The bar on the right is the estimate of the launch's time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from emulator import EmulatorError
from emulator.report import FORMAT_CONVERSIONS, estimate_seconds, read

ROW, LANE, FONT = 15, 7, 11  # pixels
BAR = 160
COLOURS = {
    "product": "#3b6fb6",
    "convolution": "#6a4fa3",
    "attention": "#1b9aaa",
    "conversion": "#d1495b",
    "": "#8d99ae",
}
HEADINGS = ("operator", "FX node", "writes", "MB moved", "GFLOP", "us (estimate)")


@dataclass
class Row:
    """A launch of a graph."""

    operator: str
    fx_node: str
    written: str  # shape and dtype of the first output
    megabytes: float
    gflop: float
    microseconds: float
    reads: list[int]
    writes: list[int]

    def cells(self) -> tuple[str, ...]:
        numbers = (f"{self.megabytes:.3f}", f"{self.gflop:.3f}", f"{self.microseconds:.1f}")
        return (self.operator, self.fx_node, self.written, *numbers)

    def kind(self) -> str:
        if self.operator in (*FORMAT_CONVERSIONS, "Cast", "Transpose"):
            return "conversion"
        names = {"MatMul": "product", "Conv": "convolution", "Attention": "attention"}
        return next((kind for name, kind in names.items() if name in self.operator), "")


def graphs_that_ran(trace: Path) -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The trace's lines about each graph that ran: that of its compilation, and those of its launches in all runs."""
    graphs: dict[str, dict[str, Any]] = {}
    launches: dict[str, list[dict[str, Any]]] = {}
    for event in read(trace):
        if event["event"] == "compile":
            graphs[event["graph"]] = event
        elif event["event"] == "launch" and "graph" in event:
            launches.setdefault(event["graph"], []).append(event)
    return {name: (graph, launches[name]) for name, graph in graphs.items() if name in launches}


def rows_of(trace: Path, name: str | None, profile: dict[str, Any]) -> tuple[str, list[Row]]:
    """The launches of the first run of the graph `name`, or of the one with the most launches, and its name.

    Raises:
        EmulatorError: the trace has no such graph, or it never ran.
    """
    ran = graphs_that_ran(trace)
    if not ran or (name is not None and name not in ran):
        wanted = "no graph" if name is None else f"no graph {name}"
        raise EmulatorError(f"{trace}: {wanted} that ran; there are: {', '.join(ran) or 'none'}")
    name = name or max(ran, key=lambda graph: ran[graph][0]["launches"])
    return name, make_rows(*ran[name], profile)


def make_rows(graph: dict[str, Any], launches: list[dict[str, Any]], profile: dict[str, Any]) -> list[Row]:
    """The launches of a graph's first run, from what `graphs_that_ran` found about it."""
    return [make_row(*pair, profile) for pair in zip(graph["steps"], launches, strict=False)]


def make_row(step: dict[str, Any], launch: dict[str, Any], profile: dict[str, Any]) -> Row:
    output = launch["tensors"][-max(1, len(step["writes"]))]
    return Row(
        operator=step["operator"],
        fx_node=step["fx"].split("-")[0],
        written=f"{'x'.join(map(str, output['shape'])) or 'scalar'} {output['dtype']}",
        megabytes=launch["bytes"] / 1e6,
        gflop=launch["flops"] / 1e9,
        microseconds=estimate_seconds(launch, profile) * 1e6,
        reads=step["reads"],
        writes=step["writes"],
    )


def format_table(rows: Sequence[Row]) -> str:
    cells = [("", *HEADINGS), *((str(number), *row.cells()) for number, row in enumerate(rows, 1))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


@dataclass
class Line:
    """A tensor of the drawing."""

    value: int
    lane: int
    rows: list[int]  # the one that writes it, and those that read it


def assign_lanes(rows: Sequence[Row]) -> list[Line]:
    """A line for each tensor that a row writes and a later one reads, in the first lane that is free all the way."""
    uses: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        for value in row.reads:
            if value in uses:
                uses[value].append(number)
        for value in row.writes:
            uses.setdefault(value, [number])
    free_from: list[int] = []  # the row from which on a lane is free
    lines = []
    for value, used in uses.items():
        if len(used) == 1:
            continue
        lane = next((lane for lane, row in enumerate(free_from) if row <= used[0]), len(free_from))
        free_from[lane : lane + 1] = [used[-1]]
        lines.append(Line(value, lane, used))
    return lines


def draw_svg(title: str, rows: Sequence[Row]) -> str:
    lines = assign_lanes(rows)
    left = LANE * (max((line.lane for line in lines), default=0) + 2)
    columns = [left + offset for offset in (0, 150, 360, 530, 600, 660)]
    width, height = columns[-1] + BAR + 80, ROW * (len(rows) + 4)
    longest = max((row.microseconds for row in rows), default=0) or 1
    total = sum(row.microseconds for row in rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="monospace" '
        f'font-size="{FONT}"><rect width="100%" height="100%" fill="white"/>',
        text(8, ROW, f"{title}: {len(rows)} launches, {total / 1e3:.3f} ms estimated", "#000"),
        *(text(x, 2.6 * ROW, heading, "#555") for x, heading in zip(columns, HEADINGS, strict=True)),
        *(shape for line in lines for shape in draw_line(line)),
    ]
    for number, row in enumerate(rows):
        colour = COLOURS[row.kind()]
        parts += [
            text(x, middle(number) + 4, cell, "#222") for x, cell in zip(columns[1:-1], row.cells()[1:], strict=False)
        ]
        parts.append(text(columns[0], middle(number) + 4, row.operator, colour))
        bar = BAR * row.microseconds / longest
        parts.append(
            f'<rect x="{columns[-1]}" y="{middle(number) - 5}" width="{bar:.1f}" height="10" fill="{colour}"/>'
        )
        parts.append(text(columns[-1] + bar + 4, middle(number) + 4, f"{row.microseconds:.1f}", "#555"))
    return "\n".join([*parts, "</svg>\n"])


def draw_line(line: Line) -> Iterable[str]:
    x = LANE * (line.lane + 1)
    colour = f"hsl({line.value * 137 % 360},45%,55%)"  # neighbours in order get hues far apart
    ends = f'y1="{middle(line.rows[0])}" y2="{middle(line.rows[-1])}"'
    yield f'<line x1="{x}" x2="{x}" {ends} stroke="{colour}" stroke-width="2"/>'
    for row in line.rows:
        yield f'<circle cx="{x}" cy="{middle(row)}" r="2.5" fill="{colour}"/>'


def middle(row: int) -> float:
    return ROW * (row + 3.5)


def text(x: float, y: float, content: str, colour: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}">{escape(content)}</text>'
