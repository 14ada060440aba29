"""Summaries of traces: what was launched, copied and waited for, and an estimate of the chip's time.

The estimate is a roofline (Williams et al., CACM 2009): a launch takes as long as its arithmetic at the nominal speed
of the chip or its traffic at the nominal bandwidth, whichever is longer. No card ever runs at both, so the sum stands
beside what it is by the times that Ascend published (calibration.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emulator import EmulatorError, calibration

FORMAT_CONVERSIONS = ("Identity", "TransData")
GRAPH_COLUMNS = ("graph", "nodes", "launches", "TransData", "Cast", "peak MB", "runs", "chip ms a run (estimate)")
COLUMNS = ("operator", "launches", "GFLOP", "MB", "host ms", "chip ms (estimate)")


@dataclass
class Total:
    launches: int = 0
    flops: float = 0
    bytes: float = 0
    host_seconds: float = 0
    chip_seconds: float = 0

    def add(self, other: Total) -> None:
        self.launches += other.launches
        self.flops += other.flops
        self.bytes += other.bytes
        self.host_seconds += other.host_seconds
        self.chip_seconds += other.chip_seconds


def read(path: Path) -> Iterable[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise EmulatorError(f"{path}, line {number}, is no line of a trace: {error}") from error


def runs_on_ai_cpu(launch: dict[str, Any], profile: dict[str, Any]) -> bool:
    """Whether the profile says that the AI Core has no kernel for this launch; what is not known counts as having one.

    The profile's rows say which dtypes of an operator's first tensor the AI Core takes.
    """
    rows = [row for row in profile["ai_cpu"] if launch["operator"] in row["operators"]]
    return bool(rows and launch["tensors"]) and launch["tensors"][0]["dtype"] not in rows[0]["ai_core"]


def estimate_seconds(launch: dict[str, Any], profile: dict[str, Any]) -> float:
    dtypes = {tensor["dtype"] for tensor in launch["tensors"]}
    speeds = profile["tflops"]
    tflops = min([speeds[dtype] for dtype in dtypes if dtype in speeds], default=speeds["float16"])
    return max(launch["flops"] / (tflops * 1e12), launch["bytes"] / profile["memory"]["bandwidth"])


def summarise(path: Path, profile: dict[str, Any]) -> str:
    """A table of the operators, the longest first, and what happened beside the launches.

    Raises:
        EmulatorError: `path` is no trace.
    """
    totals: dict[str, Total] = {}
    copies: dict[str, Total] = {}
    waits = 0
    on_ai_cpu: dict[str, int] = {}
    graphs: dict[str, dict[str, Any]] = {}
    in_graphs: dict[str, Total] = {}
    for event in read(path):
        if event["event"] == "compile":
            graphs[event["graph"]] = event
        elif event["event"] == "launch":
            one = Total(
                1, event["flops"], event["bytes"], event["microseconds"] / 1e6, estimate_seconds(event, profile)
            )
            totals.setdefault(event["operator"], Total()).add(one)
            if runs_on_ai_cpu(event, profile):
                name = f"{event['operator']} of {event['tensors'][0]['dtype']}"
                on_ai_cpu[name] = on_ai_cpu.get(name, 0) + 1
            if "graph" in event:
                in_graphs.setdefault(event["graph"], Total()).add(one)
        elif event["event"] == "copy":
            copies.setdefault(event["kind"], Total()).add(Total(1, 0, event["bytes"]))
        elif event["event"] == "sync":
            waits += 1

    everything = Total()
    for total in totals.values():
        everything.add(total)
    rows = sorted(totals.items(), key=lambda item: -item[1].chip_seconds)
    lines = [f"{COLUMNS[0]:32}" + "".join(f"{name:>20}" for name in COLUMNS[1:])]
    lines += [format_row(name, total) for name, total in [*rows, ("all", everything)]]
    conversions = sum(totals[name].launches for name in FORMAT_CONVERSIONS if name in totals)
    lines += ["", f"format conversions: {conversions}", f"waits of the host: {waits}", format_ai_cpu(on_ai_cpu)]
    lines += [
        f"copies {kind}: {total.launches} of {total.bytes / 1e6:.2f} MB" for kind, total in sorted(copies.items())
    ]
    if graphs:
        lines += ["", f"{GRAPH_COLUMNS[0]:32}" + "".join(f"{name:>26}" for name in GRAPH_COLUMNS[1:])]
        lines += [format_graph(graph, in_graphs.get(name, Total())) for name, graph in graphs.items()]
    lines += [
        f"all launches: {calibration.describe(everything.chip_seconds, profile)}",
        f"chip times are an estimate for {profile['soc']} from its nominal speed and bandwidth, not a measurement",
    ]
    return "\n".join(lines)


def format_row(name: str, total: Total) -> str:
    values = (total.flops / 1e9, total.bytes / 1e6, total.host_seconds * 1e3, total.chip_seconds * 1e3)
    return f"{name:32}{total.launches:>20}" + "".join(f"{value:>20.3f}" for value in values)


def format_ai_cpu(counts: dict[str, int]) -> str:
    each = ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
    return f"launches known to run on the AI CPU: {sum(counts.values())}" + (f" ({each})" if each else "")


def format_graph(graph: dict[str, Any], launched: Total) -> str:
    """What one compiled graph launches and keeps in memory at its peak, beside its weights."""
    runs = launched.launches // graph["launches"] if graph["launches"] else 0
    peak = (graph["feature_bytes"] + graph["constant_bytes"]) / 1e6
    counts = (graph["nodes"], graph["launches"], graph["TransData"], graph["Cast"])
    per_run = launched.chip_seconds * 1e3 / runs if runs else 0.0
    return (
        f"{graph['graph']:32}"
        + "".join(f"{count:>26}" for count in counts)
        + f"{peak:>26.3f}{runs:>26}{per_run:>26.3f}"
    )
