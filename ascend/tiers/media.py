"""What tensors are kept on: the memory of a device or of the host, and files."""

from __future__ import annotations

import fcntl
import functools
import json
import logging
import os
import shutil
import tempfile
import weakref
import zlib
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch

logger = logging.getLogger(__name__)

CHUNK = 4 * 2**20  # bytes of host memory on the way between a device and a file
# Bytes that torch's allocators of CUDA and of NPUs add to a tensor, and then round up to. Not all chips need the
# padding that torch_npu adds for some (NPUCachingAllocator.cpp): counted everywhere, it keeps the budget.
PADDING, ALLOCATION_UNIT = {"cuda": 0, "npu": 32}, 512
OWN_FOLDER = "tiers-"  # each store's, so that stores can share a folder
LOCK = "lock"
PART = ".part"


class TierError(RuntimeError):
    """A tier cannot do what it is for. What the store held before, it still holds."""


class DamagedFileError(TierError):
    """A tensor's file is gone, or is not what was written. The store's other tensors are as they were."""


@dataclass(frozen=True)
class InMemory:
    """A tensor in memory; `ready` is an event after the copy that fills it, None where the program has waited."""

    tensor: torch.Tensor
    ready: Any = None

    def copy_to(self, target: torch.Tensor) -> None:
        source = self.tensor
        if source.is_contiguous():  # as bytes: Ascend 310P copies no bfloat16 within its memory
            source, target = _bytes(source), _bytes(target)
        # A copy that returns at once reads pinned pages only.
        target.copy_(source, non_blocking=target.device.type != "cpu" and source.is_pinned())

    def erase(self) -> None:
        """Nothing to do: memory is given back with its last reference."""


class Memory:
    """The memory of `device`, in pages that stay where they are if `pinned`."""

    def __init__(self, device: torch.device, pinned: bool) -> None:
        self.device = device
        self._pinned = pinned

    def size(self, tensor: torch.Tensor) -> int:
        """Bytes that `tensor` would take here."""
        if self.device.type == "cpu":
            return tensor.nbytes
        return -(-(tensor.nbytes + PADDING[self.device.type]) // ALLOCATION_UNIT) * ALLOCATION_UNIT

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device, pin_memory=self._pinned)

    def close(self) -> None:
        """Nothing to do: memory is given back with its last reference."""


@dataclass(frozen=True)
class OnDisk:
    """A file: `start` bytes of header, then the tensor's; `checksum` is of all of them."""

    path: Path
    start: int
    checksum: int

    def copy_to(self, target: torch.Tensor) -> None:
        """Fill `target`, contiguous and of the shape and dtype that were written.

        Raises:
            DamagedFileError: the file is gone, or not what was written.
        """
        try:
            with open(self.path, "rb") as file:
                checksum = _read(file, self.start, target)
        except OSError as error:
            raise DamagedFileError(f"{self.path} cannot be read ({error.strerror}): put its tensor again") from error
        if checksum != self.checksum:
            raise DamagedFileError(f"{self.path} is damaged: put its tensor again")

    def erase(self) -> None:
        try:
            self.path.unlink(missing_ok=True)  # somebody may have been faster
        except OSError as error:
            logger.warning("%s stays until the store closes: it cannot be removed (%s)", self.path, error.strerror)


class Folder:
    """Files in a folder of this store's own, below `folder`, which is removed with them by `close` or at exit.

    Other stores and processes may use `folder` at once. What those left that were killed is removed.

    Raises:
        TierError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        self._numbers = count()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_orphans(folder)
            self.path, self._lock = _make_own_folder(folder)
        except OSError as error:
            raise TierError(f"{folder} cannot hold a tier ({error.strerror}): take one you can write to") from error
        self._remove = weakref.finalize(self, _remove_folder, self.path, os.getpid())

    def size(self, tensor: torch.Tensor) -> int:
        """Bytes of the file that `write` would make of `tensor`.

        Raises:
            ValueError: safetensors has no such dtype.
        """
        return len(_header(tensor)) + tensor.nbytes

    def write(self, tensor: torch.Tensor) -> OnDisk:
        """A safetensors file of `tensor`, whole or not there.

        By hand and in chunks: the library would want a tensor of a device in host memory as a whole.

        Raises:
            TierError: the file cannot be written; what there was of it is removed.
        """
        path = self.path / f"{next(self._numbers)}.safetensors"
        part = path.with_suffix(PART)
        header = _header(tensor)
        checksum = zlib.crc32(header)
        try:
            with open(part, "xb") as file:
                file.write(header)
                for chunk in _bytes(tensor.contiguous()).split(CHUNK):
                    values = chunk.cpu().numpy().data
                    file.write(values)
                    checksum = zlib.crc32(values, checksum)
            part.rename(path)
        except OSError as error:
            raise TierError(
                f"{path} cannot be written ({error.strerror}): nothing is lost, make room there or remove tensors"
            ) from error
        finally:
            with suppress(OSError):  # renamed, or gone with the folder
                part.unlink()
        return OnDisk(path, len(header), checksum)

    def close(self) -> None:
        self._remove()
        self._lock.close()


def _header(tensor: torch.Tensor) -> bytes:
    about = {"dtype": _name(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [0, tensor.nbytes]}
    text = json.dumps({"tensor": about}).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    return len(text).to_bytes(8, "little") + text


@functools.cache
def _name(dtype: torch.dtype) -> str:
    """What safetensors calls `dtype`, by its own word, as its table is private."""
    try:
        file = safetensors.torch.save({"tensor": torch.empty(0, dtype=dtype)})
    except KeyError:
        raise ValueError(f"safetensors files hold no {dtype}: convert the tensor, or leave out the folder") from None
    return json.loads(file[8:])["tensor"]["dtype"]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def _read(file: BinaryIO, start: int, target: torch.Tensor) -> int:
    """Fill `target` with the bytes from `start` on. Returns the checksum of the whole file."""
    checksum = zlib.crc32(file.read(start))
    for chunk in _bytes(target).split(CHUNK):
        values = chunk if chunk.device.type == "cpu" else torch.empty(chunk.shape, dtype=chunk.dtype)
        read = file.readinto(values.numpy().data)  # type: ignore[attr-defined]
        checksum = zlib.crc32(values.numpy().data[:read], checksum)
        if values is not chunk:
            chunk.copy_(values)
    return zlib.crc32(file.read(1), checksum)  # nothing more, if the file is whole


def _make_own_folder(folder: Path) -> tuple[Path, BinaryIO]:
    """A new folder, and the lock that tells others that its process is alive; the system gives it up with that."""
    new = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))  # not yet by a name that others clear away
    path = folder / f"{OWN_FOLDER}{os.getpid()}-{new.name.removeprefix('.new-')}"
    try:
        lock = open(new / LOCK, "wb")  # noqa: SIM115  it stays open as long as the store is
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        new.rename(path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return path, lock


def _remove_orphans(folder: Path) -> None:
    for lock in folder.glob(f"{OWN_FOLDER}*/{LOCK}"):
        with suppress(OSError), open(lock, "rb+") as file:  # locked by its owner, or another process was faster
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)


def _remove_folder(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # a child that was forked has this to do at its exit too
        shutil.rmtree(path, ignore_errors=True)
