"""Checkpoints of a training: whole or absent, bounded in number, enough to go on to the very same weights."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from runners.cli import UserError
from runners.files import write_json
from runners.weight_files import first_line

STATE, ABOUT = "state.pt", "about.json"
PART = ".part"


class Checkpoint(NamedTuple):
    """What a folder holds."""

    step: int
    about: dict[str, Any]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints in one folder, `step-00000100` after 100 steps.

    Args:
        keep: how many of the last ones stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Of the whole ones, in ascending order."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-????????"))

    def save(self, step: int, about: dict[str, Any], state: dict[str, Any]) -> None:
        """Write what makes `step` aside, then rename it; then remove those that are too many."""
        scratch = self.folder / f".step-{step:08}.{os.getpid()}{PART}"
        try:
            scratch.mkdir(parents=True)
            torch.save(state, scratch / STATE)
            write_json(scratch / ABOUT, about)
            scratch.replace(self._path(step))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        for old in self.steps()[: -self.keep]:
            self._remove(old)

    def load(self, step: int) -> Checkpoint:
        """Raises UserError: a file of it is damaged."""
        path = self._path(step)
        try:
            about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
            state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        except Exception as error:  # of any kind: pickle raises what it meets
            raise UserError(
                f"checkpoint {path} is damaged ({first_line(error)}): remove it, and --resume takes the one before"
            ) from error
        return Checkpoint(step, about, state)

    def remove_scratch(self) -> None:
        """What a process that was killed left half written or half removed. Call it while nobody else writes here."""
        for part in self.folder.glob(f".*{PART}"):
            shutil.rmtree(part)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08}"

    def _remove(self, step: int) -> None:
        scratch = self.folder / f".step-{step:08}.{os.getpid()}{PART}"
        self._path(step).replace(scratch)  # at once: what is half removed must not look whole
        shutil.rmtree(scratch)


@contextmanager
def one_training_in(folder: Path) -> Iterator[None]:
    """Raises UserError: another process trains in `folder`."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another training runs in {folder}: take another --output_dir") from None
        yield


def random_states(device: torch.device) -> dict[str, Any]:
    """The generators of Python, NumPy and torch, on the CPU and on `device`."""
    kind, keys, *rest = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "cpu": torch.get_rng_state(),
    }
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    return states


def restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["cpu"])
    if "device" in states and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states["device"], device)
