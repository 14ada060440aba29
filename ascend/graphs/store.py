"""Graphs on disk, for the processes that come later or run beside this one.

An entry is a folder: it is written under another name and renamed when it is whole, by the one process that holds the
entry's lock, so that nobody reads half a graph and no two processes compile the same one. The system gives up the lock
of a process that is killed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

INDEX = "entry.json"  # what an entry is of, and the checksums of its files
PART = ".part"
DEFAULT_LIMIT = 8 * 2**30  # bytes
UNUSED_DAYS = 90
DAY = 24 * 60 * 60  # seconds


def default_graph_cache() -> Path:
    """In the user's cache directory, see the XDG base directory specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusers-npu" / "graphs"


class GraphStore:
    """The entries in `folder`, which together take about `limit` bytes.

    Entries are removed, the longest unused first, when others make them exceed `limit`, and after `UNUSED_DAYS`.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder = folder
        self.limit = DEFAULT_LIMIT if limit is None else limit

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Keep other processes, and threads, from the entry `name`; waits for one that makes it."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder.stat().st_uid != os.getuid():
            raise PermissionError(
                f"graphs are programs, and {self.folder} is another user's: take a folder of your own"
            )
        lock = self._lock(name)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("waiting for another process that makes the same graph (%s)", lock.lock_file)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def find(self, name: str) -> Path | None:
        """The entry's folder, marked as used now; None where there is none. Removes a damaged one. Wants the lock."""
        entry = self.folder / name
        if not entry.exists():
            return None
        if not _is_whole(entry):
            logger.warning("the graph %s is damaged and is made again", entry)
            self._remove(name)
            return None
        os.utime(entry / INDEX)
        return entry

    @contextmanager
    def make(self, name: str, about: dict[str, Any]) -> Iterator[Path]:
        """A folder to write the entry into, which takes its name when the block ends well. Wants the lock.

        A block that removes the folder makes no entry.

        Args:
            about: what the entry is of, for a person who looks into it.
        """
        part = self.folder / f"{name}{PART}"
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        part.mkdir(mode=0o700)
        try:
            yield part
            if not part.exists():
                return
            index = about | {"files": _checksums(part)}
            (part / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            part.rename(self.folder / name)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        self.prune(keep=name)

    def prune(self, keep: str | None = None) -> None:
        """Remove what is too old or too much, but for the entry `keep` and those that a process holds the lock of."""
        entries = sorted(self._entries(), reverse=True)  # the last used first
        total = 0
        for used, size, name in entries:
            total += size
            is_too_old = time.time() - used > UNUSED_DAYS * DAY
            if name != keep and (is_too_old or total > self.limit) and self._remove_unlocked(name):
                total -= size

    def _entries(self) -> Iterator[tuple[float, int, str]]:
        """When each entry was used last, its bytes and its name; what a killed process left counts as never used."""
        for folder in self.folder.iterdir():
            try:
                size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                if folder.suffix == PART:
                    yield 0.0, size, folder.stem
                elif folder.is_dir():
                    yield (folder / INDEX).stat().st_mtime, size, folder.name
            except FileNotFoundError:  # another process removed it
                continue

    def _remove_unlocked(self, name: str) -> bool:
        lock = self._lock(name)
        try:
            with lock.acquire(timeout=0):
                self._remove(name)
                return True
        except Timeout:
            return False

    def _remove(self, name: str) -> None:
        """Under another name first, so that no half of it is found."""
        part = self.folder / f"{name}{PART}"
        shutil.rmtree(part, ignore_errors=True)
        if (self.folder / name).exists():
            (self.folder / name).rename(part)
            shutil.rmtree(part)

    def _lock(self, name: str) -> FileLock:
        return FileLock(self.folder / f"{name}.lock", mode=0o600)


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != INDEX)
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _is_whole(entry: Path) -> bool:
    try:
        files: dict[str, str] = json.loads((entry / INDEX).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return False
    found = _checksums(entry)  # later runs may have added files
    return all(found.get(name) == checksum for name, checksum in files.items())
