"""The edits that a run makes: of the command line, or of a file."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import PIL.Image

from runners.cli import UserError
from runners.images import PICTURES

MOST_PIXELS = 200_000_000
REPORT = "report"  # .json: of the whole run, in the folder of results


@dataclass(frozen=True)
class Edit:
    """One picture, what to change in it, and the name of the result."""

    image: Path
    instruction: str
    target_description: str | None
    seed: int
    name: str

    def digest(self, settings: dict[str, Any]) -> str:
        """Of all that decides what the result looks like, and of the picture's content."""
        content = asdict(self) | {"image": hashlib.sha256(self.image.read_bytes()).hexdigest()} | settings
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def list_edits(args: argparse.Namespace) -> list[Edit]:
    """Those of `args`, of pictures that are there and can be read.

    Raises:
        UserError: a picture or a row cannot be used, or two results would have one name.
    """
    edits = list(_of_file(args)) if args.edits else list(_of_arguments(args))
    if not edits:
        raise UserError(f"{args.edits or args.image[0]} holds no picture to edit")
    names: dict[str, Edit] = {}
    for edit in edits:
        if edit.name == REPORT:
            raise UserError(f"{edit.image}: a result called {REPORT} would be overwritten by {REPORT}.json: rename it")
        other = names.setdefault(edit.name, edit)
        if other is not edit:
            raise UserError(f"{other.image} and {edit.image} give two results called {edit.name}: rename one of them")
    return edits


def _of_arguments(args: argparse.Namespace) -> Iterator[Edit]:
    for path in args.image:
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES) if path.is_dir() else [path]
        for file in files:
            yield Edit(file, args.instruction.strip(), args.target_description or None, args.seed, file.stem)


def _of_file(args: argparse.Namespace) -> Iterator[Edit]:
    try:
        lines = args.edits.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--edits {args.edits}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield _of_row(json.loads(line), args, number)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f'--edits {args.edits}, line {number} must be as {{"image": "a.png", "instruction": "..."}}: '
                    f"{error}"
                ) from error


def _of_row(row: dict[str, Any], args: argparse.Namespace, number: int) -> Edit:
    description = row.get("target_description")
    if not isinstance(description, str | None):
        raise ValueError(f"target_description must be a text, not {description!r}")
    image = args.edits.parent / str(row["image"])
    instruction = row["instruction"].strip()
    seed = row.get("seed", args.seed)
    if not instruction:
        raise ValueError("the instruction is empty")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be a whole number below 2^63, not {seed!r}")
    for text in (instruction, description or "", str(row.get("id", ""))):
        text.encode()  # a lone surrogate is no text
    name = str(row.get("id", f"{number:05}_{image.stem}"))
    if Path(name).name != name or name.startswith(".") or not name.isprintable():
        raise ValueError(f"id {name!r} names no file")
    return Edit(image, instruction, description or None, seed, name)


def open_picture(path: Path) -> PIL.Image.Image:
    """The picture in `path`, read.

    Raises:
        UserError: it is no picture, or one of more than 200 megapixels.
    """
    PIL.Image.MAX_IMAGE_PIXELS = None  # the limit below is an error, where Pillow's own would be a warning first
    try:
        with PIL.Image.open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise UserError(f"{path} has {image.width} x {image.height} pixels: scale it down to 200 megapixels")
            image.load()
            return image
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"cannot read the picture {path}: {error}") from error
