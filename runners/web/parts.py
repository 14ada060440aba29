"""What both tabs of the page are made of."""

from __future__ import annotations

import html
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from runners.cli import UserError
from runners.files import write_json
from runners.images import save_png
from runners.web.texts import text
from runners.web.worker import OnStep

# Of all that wants the one worker, so that people see their place.
QUEUE: dict[str, Any] = {"concurrency_id": "device", "concurrency_limit": 1}
# Of what does not wait for the worker; boxes with messages come through the queue alone.
AT_ONCE: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
PROGRESS = gr.Progress()
KEPT_SECONDS = 24 * 3600  # uploads and results


class Translated:
    """Makes components, and remembers which of their texts follow the language."""

    def __init__(self, language: str) -> None:
        self.language = language
        self._keys: list[tuple[Any, dict[str, str]]] = []

    def __call__(self, kind: Callable[..., Any], keys: dict[str, str], **options: Any) -> Any:
        """A component whose attributes `keys` are texts of the table."""
        component = kind(**{name: text(key, self.language) for name, key in keys.items()}, **options)
        self._keys.append((component, keys))
        return component

    @property
    def components(self) -> list[Any]:
        return [component for component, _ in self._keys]

    def updates(self, language: str) -> list[dict[str, Any]]:
        """Of `components`."""
        return [gr.update(**{name: text(key, language) for name, key in keys.items()}) for _, keys in self._keys]


def slider(make: Translated, key: str, bounds: tuple[float, float, float], value: float) -> gr.Slider:
    least, most, step = bounds
    return make(gr.Slider, {"label": key}, minimum=least, maximum=most, step=step, value=value)


def seed_number(make: Translated, value: int, most: int | None) -> gr.Number:
    return make(gr.Number, {"label": "seed"}, value=value, precision=0, minimum=0, maximum=most)


def files_to_download(make: Translated, elem_id: str) -> gr.Files:
    return make(gr.Files, {"label": "files"}, interactive=False, visible=False, height=240, elem_id=elem_id)


@contextmanager
def errors_shown() -> Iterator[None]:
    """What the person can put right is shown to them; what is a bug stays a traceback of the server."""
    try:
        yield
    except UserError as problem:
        raise error(str(problem)) from problem


def error(message: str) -> gr.Error:
    """`message` as a box on the page, which would read it as HTML."""
    return gr.Error(html.escape(message), print_exception=False)


def warn(message: str) -> None:
    gr.Warning(html.escape(message))


def steps_shown(progress: gr.Progress, language: str, number: int = 1, count: int = 1) -> OnStep:
    """Shows how far picture `number` of `count` is."""
    key = "picture_step" if count > 1 else "step"

    def show(step: int, steps: int) -> None:
        progress((step, steps), desc=text(key, language, number=number, count=count, step=step, steps=steps))

    return show


def save(image: Image.Image, name: str, about: dict[str, Any], folder: Path) -> list[str]:
    """`image` as a .png with `about` inside, and beside it as .json: their paths."""
    path = folder / f"{name}.png"
    save_png(image, path, {key: json.dumps(value, ensure_ascii=False, default=str) for key, value in about.items()})
    write_json(path.with_suffix(".json"), json.loads(json.dumps(about, default=str)))
    return [str(path), str(path.with_suffix(".json"))]


@contextmanager
def new_folder(scratch: Path) -> Iterator[Path]:
    """A folder in `scratch` for the results of one job, gone again if that fails."""
    folder = Path(tempfile.mkdtemp(prefix="job-", dir=scratch))
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder)
        raise


class Results(NamedTuple):
    """What one person's page shows: files of a picture before and after, for each, and the folder that has them."""

    folder: Path | None = None
    pairs: list[tuple[str, str]] = []

    @staticmethod
    def state() -> gr.State:
        """Of the page; files are removed some time after it was closed."""
        return gr.State(Results(), time_to_live=KEPT_SECONDS, delete_callback=Results.remove)

    def remove(self) -> None:
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
