"""Files of weights: whole, safe to load, and told from others by their content."""

import hashlib
import pickle
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from runners.cli import UserError

LFS_POINTER = b"version https://git-lfs"
ZIP = b"PK\x03\x04"


def check_weights(path: Path) -> None:
    """Make sure that the file is whole and holds tensors and nothing that would run, without reading the tensors.

    Raises:
        UserError: it is not; the message names the file and says what to do.
    """
    start = read_start(path)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):  # the header says how long the file has to be
                return
        except SafetensorError as error:
            raise UserError(f"weights {path} are damaged ({error}); copy them again") from error
    is_archive = zipfile.is_zipfile(path)
    if start.startswith(ZIP) and not is_archive:  # its directory stands at the end
        raise UserError(f"weights {path} are cut short; copy them again")
    try:
        # weights_only refuses whatever is no tensor; the tensors of an archive stay in the file.
        torch.load(path, weights_only=True, map_location="meta", mmap=is_archive)
    except pickle.UnpicklingError as error:  # torch's own text advises to load it all the same
        raise UserError(
            f"weights {path} are damaged or hold more than tensors, which is not safe to load; copy them again, or "
            "take the model's .safetensors files"
        ) from error
    except (RuntimeError, EOFError, KeyError, OSError, ValueError) as error:
        raise UserError(f"weights {path} are damaged ({first_line(error)}); copy them again") from error


def read_start(path: Path) -> bytes:
    """The first bytes of a file, which is there and no stand-in for one.

    Raises:
        UserError: a link leads nowhere, the file cannot be read, or it is a git-lfs pointer.
    """
    if path.is_symlink() and not path.exists():
        raise UserError(
            f"{path} is a link to {path.readlink()}, which is not there; copy the model with what its links lead to "
            "(cp -rL), or download it again"
        )
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except FileNotFoundError:
        raise UserError(f"the model lacks {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if start == LFS_POINTER:
        raise UserError(f"{path} is a git-lfs pointer instead of the file: run git lfs pull in the model's folder")
    return start


def digest_of_files(folder: Path, files: Sequence[Path]) -> str:
    """SHA-256 of the content of `files`, and of the names of those in `folder`, in hexadecimal.

    All bytes are read, at about 1 GB/s of each CPU core where the disk keeps up, so that exchanged weights of equal
    size are noticed whatever their dates say.
    """
    with ThreadPoolExecutor() as pool:
        digests = pool.map(digest_of_file, files)
        names = (path.relative_to(folder) if path.is_relative_to(folder) else "" for path in files)
        lines = sorted(f"{name} {digest}" for name, digest in zip(names, digests, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """SHA-256 of its content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
