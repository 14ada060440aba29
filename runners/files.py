"""Output files that are whole or absent, never half written."""

import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

from runners.cli import UserError

SCRATCH = ".part"


def make_output_dir(path: Path, what: str = "output directory") -> Path:
    """Create `path` when it is missing and make sure that files can be written there, before hours are spent."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise UserError(f"cannot write to {what} {path}: {error.strerror}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a name beside `path` that no reader looks for and no other process takes, then rename."""
    scratch = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}{SCRATCH}")
    try:
        scratch.write_bytes(data)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def remove_scratch(folder: Path) -> None:
    """Remove what writers that were killed left in `folder`. Any that are still at work there fail."""
    for scratch in folder.glob(f".*{SCRATCH}"):
        scratch.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Atomically; a path in `content` becomes its text. Raises TypeError: something in it is none of JSON's values."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False, default=_path_text)
    write_atomically(path, f"{text}\n".encode())


def _path_text(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{value!r} is no value that JSON has")
