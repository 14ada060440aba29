"""What a run was made with and what came out of it: report.json and a table for the terminal."""

import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runners.files import write_json

PACKAGES = ("torch", "torch_npu", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "pillow")


class Report:
    """Collects the sections of report.json. Warnings go to stderr as they come, each once, and into the report."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.sections: dict[str, Any] = {}

    def warn(self, message: str) -> None:
        if message not in self.warnings:  # a hundred black pictures are one line
            print("warning:", message, file=sys.stderr)
            self.warnings.append(message)

    def write(self, path: Path) -> None:
        write_json(path, {"versions": versions(), **self.sections, "warnings": self.warnings})


def versions(more: Sequence[str] = ()) -> dict[str, str | None]:
    """Of Python, of the packages that decide what a picture looks like, and of `more`; None for what is not there."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in (*PACKAGES, *more):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def format_table(headings: Sequence[str], rows: Sequence[tuple[str, Sequence[float | None], str]]) -> str:
    """Rows of `(name, one number for each heading or None, format)` as aligned text, None as a dash."""
    cells = [["", *headings]]
    for name, numbers, number_format in rows:
        cells.append([name, *("-" if number is None else format(number, number_format) for number in numbers)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in cells
    )
