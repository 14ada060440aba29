"""The page: a line about the device, and a tab for each thing that can be done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from ascend.device import get_device_info
from runners.web import draw_tab, edit_tab
from runners.web.drawing import DrawingModel
from runners.web.editing import EditingModel
from runners.web.parts import KEPT_SECONDS, Translated
from runners.web.texts import LANGUAGES, text
from runners.web.worker import Worker

STATUS_SECONDS = 2
# Of the machine that shows the page: gradio's own are for Latin letters only.
FONTS: tuple[str, ...] = ("system-ui", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif")
CSS = ".grid-wrap { padding-top: 2.5rem !important }"  # below the label, which covers pictures otherwise
MOST_WAITING = 64


def build_page(
    editing: Sequence[EditingModel],
    drawing: DrawingModel,
    worker: Worker,
    folder: Path,
    scratch: Path,
    dtype: torch.dtype,
    language: str,
) -> gr.Blocks:
    """All of the page; `folder` has the demo's picture, `scratch` keeps results, `language` is of `LANGUAGES`."""
    make = Translated(language)

    def status(language: str) -> str:
        return describe_device(worker, dtype, language)

    with gr.Blocks(title="HiDream-E1 · Stable Diffusion", delete_cache=(3600, KEPT_SECONDS)) as page:
        with gr.Row(equal_height=True):
            with gr.Column(scale=4):
                make(gr.Markdown, {"value": "title"})
            with gr.Column(scale=1, min_width=200):
                names = [(name, key) for key, name in LANGUAGES.items()]
                chooser = make(gr.Radio, {"label": "language"}, choices=names, value=language, elem_id="language")
        line = gr.Markdown(status(language), elem_id="status")
        with make(gr.Tab, {"label": "edit_tab"}, id="edit"):
            edit_tab.EditTab(editing, worker, folder, scratch, make, chooser)
        with make(gr.Tab, {"label": "draw_tab"}, id="draw"):
            draw_tab.DrawTab(drawing, worker, scratch, make, chooser)
        private: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        chooser.change(make.updates, chooser, make.components, **private)
        for event in (gr.Timer(STATUS_SECONDS).tick, page.load, chooser.change):
            event(status, chooser, line, **private)

        def leave(request: gr.Request) -> None:
            for tab in (edit_tab, draw_tab):
                worker.cancel(tab.owner_of(request))

        page.unload(leave)
    return page.queue(max_size=MOST_WAITING)


def describe_device(worker: Worker, dtype: torch.dtype, language: str) -> str:
    """A line of Markdown: device, precision, memory, which model is loaded, and whether it works."""
    memory = worker.manager.memory_stats()
    return text(
        "status",
        language,
        device=get_device_info(worker.manager.device)["name"],
        dtype=str(dtype).removeprefix("torch."),
        used=size(memory["allocated"]),
        total=size(memory["total"]),
        peak=size(memory["peak"]),
        model=worker.loaded_name or text("nothing_loaded", language),
        state=text("busy" if worker.is_busy else "idle", language),
    )


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
