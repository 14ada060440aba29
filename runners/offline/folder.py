"""What convert_to_om.py writes: files of models, and model_config.json, which says what they are.

That file names the others with a digest of each and comes last, so that a folder holds one conversion, whole: one that
was killed while its files took the places of an earlier one's is refused.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from runners.cli import UserError
from runners.files import make_output_dir, write_json
from runners.model_dir import read_json
from runners.weight_files import digest_of_file

CONFIG = "model_config.json"
ONNX, OM = "onnx", "om"
SCRATCH = ".converting_"


class Stage(NamedTuple):
    """A conversion that is being made.

    Attributes:
        folder: where its files are written.
        config: what CONFIG will hold, beside the digests of the files.
    """

    folder: Path
    config: dict[str, Any]


@contextmanager
def staged(target: Path, names: Sequence[str]) -> Iterator[Stage]:
    """What is written there goes into `target`, in the place of an earlier conversion, or vanishes when a part fails.

    Args:
        names: of the exports.

    Raises:
        UserError: `target` holds other exports, whose description this one's would replace.
    """
    make_output_dir(target)
    earlier = _files_of(target)
    others = {name.removesuffix(f".{ONNX}") for name in earlier if name.endswith(f".{ONNX}")} - set(names)
    if others:
        raise UserError(f"{target} holds {', '.join(sorted(others))}: give {', '.join(names)} a folder of its own")
    for left in target.glob(f"{SCRATCH}*"):  # by one that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory(dir=target, prefix=SCRATCH) as name:
            stage = Stage(Path(name), {})
            yield stage
            _publish(stage, target, {*earlier, *(f"{name}.{OM}" for name in names)})
    except OSError as error:
        error.filename = error.filename or str(target)  # a write that finds the disk full does not say where
        raise


def _publish(stage: Stage, target: Path, earlier: set[str]) -> None:
    """Puts the files of `stage` into the places of those called `earlier`; CONFIG last."""
    files = _digests(sorted(stage.folder.iterdir()))
    stage.config["files"] = files
    write_json(stage.folder / CONFIG, stage.config)
    for name in files:
        (stage.folder / name).replace(target / name)
    for name in earlier - set(files):
        (target / name).unlink(missing_ok=True)
    (stage.folder / CONFIG).replace(target / CONFIG)


def _files_of(folder: Path) -> dict[str, str]:
    """The digests by name of the files that the conversion in `folder` has; none where there is none."""
    try:
        return dict(read_json(folder / CONFIG)["files"])
    except (UserError, KeyError):
        return {}


def _digests(paths: Sequence[Path]) -> dict[str, str]:
    with ThreadPoolExecutor() as pool:
        return dict(zip((path.name for path in paths), pool.map(digest_of_file, paths), strict=True))


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
        """Of its ONNX or OM file."""
        return self.folder / f"{self.name}.{kind}"


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


def read_folder(folder: Path, kind: str) -> ExportedClip:
    """What is in `folder`, for its files of `kind`, ONNX or OM, all of which are read once for their digests.

    Raises:
        UserError: `folder` holds no exported CLIP, none of that kind, or files of two conversions.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} holds no exported CLIP, it lacks {CONFIG}: convert_to_om.py clip makes one")
    config = read_json(folder / CONFIG)
    try:
        images, texts = (ExportedTower(folder, **config[name]) for name in ("image_tower", "text_tower"))
        exported = ExportedClip(images, texts, config["text_length"], config["scoring"])
        files = dict(config["files"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG} is not what convert_to_om.py clip writes: {error}") from error
    for tower in (images, texts):
        if tower.path(kind).name not in files:
            made_by = "convert_to_om.py clip" + (" without --onnx-only" if kind == OM else "")
            raise UserError(f"{tower.path(kind)} is missing: {made_by} makes it")
    other = f".{OM if kind == ONNX else ONNX}"
    _check_files(folder, {name: digest for name, digest in files.items() if not name.endswith(other)})
    return exported


def _check_files(folder: Path, files: dict[str, str]) -> None:
    """Raise UserError unless these files are there as they were written."""
    there = [folder / name for name in files if (folder / name).is_file()]
    found = _digests(there)
    foreign = [name for name, digest in files.items() if found.get(name) != digest]
    if foreign:
        state = "not the file that was written with it" if foreign[0] in found else "missing"
        raise UserError(
            f"{CONFIG} names {folder / foreign[0]}, which is {state}: a conversion was interrupted, or files were "
            "copied or changed one by one; run convert_to_om.py again"
        )
