"""Pictures with captions, from a folder or from Parquet files, one by one; what cannot be used is listed, not fatal.

A folder follows the imagefolder convention of the datasets library: `metadata.jsonl` with a row for each picture,
`{"file_name": "a.png", "text": "a caption"}`, in the folder or those below it; or a `.txt` file beside each picture.
"""

from __future__ import annotations

import io
import json
import mimetypes
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from PIL import Image

from runners.cli import UserError
from runners.images import PICTURES, decode_picture
from runners.weight_files import first_line

METADATA = "metadata.jsonl"
UTF_8 = "utf-8-sig"  # which leaves out the mark that editors on Windows begin a file with


@dataclass(frozen=True)
class Picture:
    """One picture's file, unread, and what it shows."""

    name: str
    caption: str
    data: bytes

    def decode(self) -> Image.Image:
        """The picture the right way up, RGB, transparency on white. Raises UserError: it cannot be read."""
        picture = decode_picture(self.name, io.BytesIO(self.data))
        if "A" in picture.getbands() or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture)
        return picture.convert("RGB")


@dataclass
class Skipped:
    """What is left out, and why, by the name of the picture."""

    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, reason: str) -> None:
        self.reasons[name] = reason


def read_pictures(source: Path, image_column: str, caption_column: str, skipped: Skipped) -> Iterator[Picture]:
    """The pictures of a folder or of a Parquet file, or of a folder of Parquet files, in the order of their names.

    Args:
        image_column: of Parquet files; rows hold bytes, or `{"bytes": ..., "path": ...}` as datasets writes them.
        caption_column: of Parquet files and of METADATA.
        skipped: gets what is missing, has no caption, cannot be read or is a file beside Parquet files.

    Raises:
        UserError: there is no such folder or file, it holds no picture, or METADATA is no JSON lines.
    """
    if not source.exists():
        raise UserError(f"--data {source} does not exist")
    if source.is_file():
        if source.suffix != ".parquet":
            raise UserError(f"--data {source} is neither a folder nor a .parquet file")
        yield from _from_parquet(source.parent, [source], image_column, caption_column, skipped)
        return
    files = sorted(files_below(source))
    parquet = [path for path in files if path.suffix == ".parquet"]
    if parquet:
        for path in filter(_is_picture, files):
            skipped.add(_name_of(path, source), "beside Parquet files, of which the rows alone are read")
        yield from _from_parquet(source, parquet, image_column, caption_column, skipped)
    else:
        yield from _from_folder(source, files, caption_column, skipped)


def files_below(folder: Path) -> Iterator[Path]:
    """The files in `folder` and below it, through links too; each folder once, as links may lead in circles."""
    seen: set[Path] = set()
    starts = [folder]
    for start in starts:  # which grows: links come after what is there itself, whose names metadata has
        for at, below, names in os.walk(start):
            real = Path(at).resolve()
            if real in seen:
                below.clear()
                continue
            seen.add(real)
            below.sort()
            starts += [path for path in (Path(at, name) for name in below) if path.is_symlink()]
            yield from (Path(at, name) for name in names)


def _from_folder(folder: Path, files: list[Path], caption_column: str, skipped: Skipped) -> Iterator[Picture]:
    captions = _captions_of_metadata(folder, files, caption_column, skipped)
    pictures = set(filter(_is_picture, files))
    for path in (path for path in files if path not in pictures and _is_other_picture(path)):
        skipped.add(_name_of(path, folder), f"of no format that is read ({', '.join(PICTURES)})")
    if not pictures and not captions:
        raise UserError(f"--data {folder} holds no picture ({', '.join(PICTURES)}) and no .parquet file")
    for path in sorted(pictures | set(captions)):
        name = _name_of(path, folder)
        own = captions.get(path) or _captions_beside(path)
        if not own:
            skipped.add(
                name, f"no caption: no row in {METADATA} and no UTF-8 text in {Path(name).with_suffix('.txt').name}"
            )
            continue
        try:
            data = path.read_bytes()
        except (OSError, ValueError) as error:  # the latter of what cannot be a file's name
            skipped.add(name, f"cannot be read: {getattr(error, 'strerror', None) or error}")
            continue
        for caption in own:
            yield Picture(name, caption, data)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES and not path.name.startswith(".")


def _is_other_picture(path: Path) -> bool:
    kind, _ = mimetypes.guess_type(path.name)
    return kind is not None and kind.startswith("image/") and not path.name.startswith(".")


def _name_of(path: Path, folder: Path) -> str:
    name = str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
    return name.encode(errors="replace").decode()  # as bytes that are no UTF-8 have no place in a report


def _captions_of_metadata(folder: Path, files: list[Path], column: str, skipped: Skipped) -> dict[Path, list[str]]:
    """In the order of their rows: a picture that has several is learnt with each."""
    captions: dict[Path, list[str]] = {}
    for table in (path for path in files if path.name == METADATA):
        try:
            lines = table.read_text(encoding=UTF_8).split("\n")  # not splitlines(): captions may have U+2028
        except UnicodeDecodeError as error:
            raise UserError(
                f"{table} is no UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
            ) from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{table.relative_to(folder)}:{number}"
            try:
                row = json.loads(line)
                path = table.parent / row["file_name"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(
                    f'{table}:{number} is no row such as {{"file_name": "a.png", "{column}": "a caption"}}: '
                    f"{type(error).__name__}: {first_line(error)}"
                ) from error
            caption = row.get(column)
            if is_caption(caption):
                captions.setdefault(path, []).append(caption.strip())
            else:
                skipped.add(where, f"no caption in {column!r} for {row['file_name']!r}")
    return captions


def _captions_beside(path: Path) -> list[str]:
    try:
        caption = path.with_suffix(".txt").read_text(encoding=UTF_8).strip()
    except (OSError, UnicodeDecodeError):
        return []
    return [caption] if caption else []


def _from_parquet(
    root: Path, files: list[Path], image_column: str, caption_column: str, skipped: Skipped
) -> Iterator[Picture]:
    for path in files:
        for number, row in enumerate(_rows(path, image_column, caption_column)):
            name = f"{path.relative_to(root)}:{number}"
            data, caption = _bytes_of(row[image_column]), row[caption_column]
            if data is None:
                skipped.add(name, f"no bytes of a picture in {image_column!r}")
            elif not is_caption(caption):
                skipped.add(name, f"no caption in {caption_column!r}")
            else:
                yield Picture(name, caption.strip(), data)


def _rows(path: Path, *columns: str) -> Iterator[dict[str, Any]]:
    """Row group by row group: the whole need not fit in memory, and no copy of it is made on disk."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(f"--data {path}: {error}: pip install -r requirements-training.txt") from error
    try:
        table = ParquetFile(path)
        lacking = set(columns) - set(table.schema_arrow.names)
        if lacking:
            raise UserError(
                f"--data {path} has the columns {', '.join(table.schema_arrow.names)} and no "
                f"{' and no '.join(sorted(lacking))}: see --image_column and --caption_column"
            )
        for batch in table.iter_batches(batch_size=64, columns=list(columns)):
            yield from batch.to_pylist()
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data {path} is no Parquet file, or damaged: {first_line(error)}") from error


def is_caption(cell: Any) -> TypeGuard[str]:
    """Whether it is text that says something; halves of surrogate pairs, which JSON can hold, are none."""
    return isinstance(cell, str) and bool(cell.strip()) and cell.encode(errors="ignore").decode() == cell


def _bytes_of(cell: Any) -> bytes | None:
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    return data if isinstance(data, bytes) else None
