"""What convert_to_om.py writes of a CLIP: two towers, a file each, and model_config.json, which says what they are."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runners.cli import UserError
from runners.files import write_json
from runners.model_dir import read_json

CONFIG = "model_config.json"
ONNX, OM = "onnx", "om"


@dataclass(frozen=True)
class ExportedTower:
    """One tower of a CLIP.

    Attributes:
        name: of its files, without the ending.
        input: name of its only input.
        batch_sizes: numbers of inputs that its files take.
        takes_bytes: whether the offline model's input is uint8 [count, height, width, 3].
    """

    folder: Path
    name: str
    input: str
    batch_sizes: list[int]
    takes_bytes: bool = False

    def path(self, kind: str) -> Path:
        """Of its ONNX or OM file. Raises UserError where it is missing."""
        path = self.folder / f"{self.name}.{kind}"
        if not path.is_file():
            made_by = "convert_to_om.py clip" + (" without --onnx-only" if kind == OM else "")
            raise UserError(f"{path} is missing: {made_by} makes it")
        return path


@dataclass(frozen=True)
class ExportedClip:
    images: ExportedTower
    texts: ExportedTower
    text_length: int
    scoring: dict[str, Any]  # arguments of `runners.clip.checkpoint.Scoring`

    def settings(self) -> dict[str, Any]:
        """Of CONFIG, for `read_folder`."""
        towers = {"image_tower": self.images, "text_tower": self.texts}
        described = {name: {k: v for k, v in asdict(t).items() if k != "folder"} for name, t in towers.items()}
        return {"text_length": self.text_length, "scoring": self.scoring, **described}


def write_config(folder: Path, exported: ExportedClip, about: dict[str, Any]) -> dict[str, Any]:
    """Write and return CONFIG; `about` is what else it says."""
    config = {**about, **exported.settings()}
    write_json(folder / CONFIG, config)
    return config


def read_folder(folder: Path) -> ExportedClip:
    """Raises UserError where `folder` holds no exported CLIP."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} holds no exported CLIP, it lacks {CONFIG}: convert_to_om.py clip makes one")
    config = read_json(folder / CONFIG)
    try:
        images, texts = (ExportedTower(folder, **config[name]) for name in ("image_tower", "text_tower"))
        return ExportedClip(images, texts, config["text_length"], config["scoring"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / CONFIG} is not what convert_to_om.py clip writes: {error}") from error
