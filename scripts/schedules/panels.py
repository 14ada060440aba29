"""Quality against cost, a panel for each guidance scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from runners.images import save_figure

COLUMNS = 2


def plot_panels(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], xlabel: str, title: str, path: Path
) -> None:
    """`panels` are by guidance scale, then by the name of a line; its points are of a cost and of PSNR in dB.

    Lines whose names begin with "--" are ours, and are drawn whole.
    """
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 4 * rows), layout="constrained")
    for number, (guidance_scale, lines) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        for name, points in lines.items():
            style = "o-" if name.startswith("--") else ".--"
            axes.plot(*zip(*sorted(points), strict=True), style, label=name)
        axes.set(xlabel=xlabel, ylabel="PSNR to the picture of all steps (dB)", title=f"guidance {guidance_scale}")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)))
    figure.suptitle(title)
    save_figure(figure, path)
