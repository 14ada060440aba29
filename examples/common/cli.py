"""What every runner's command line shares: one-line errors, argument types, prompts."""

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch

from ascend.device import DeviceError
from ascend.parallel import ParallelError

BAD_INPUT = 2
FAILED = 1
INTERRUPTED = 130  # as a shell says of a command ended by Ctrl-C


class UserError(Exception):
    """Something the user can put right; the message says what is wrong, with which value, and what to do."""


class RankFailedError(Exception):
    """A rank failed, and the others have been ended."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ArgumentParser(argparse.ArgumentParser):
    """Reports bad arguments as every other error: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} ({self.prog} --help lists the options)", BAD_INPUT)


def fail(message: object, exit_code: int) -> NoReturn:
    """End the program with `message` as one line on stderr."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(exit_code)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors that are no bugs into one line on stderr, with exit code 2 for bad input and 1 for the others."""
    try:
        yield
    except (UserError, DeviceError, ParallelError) as error:
        fail(error, BAD_INPUT)
    except RankFailedError as error:
        fail(error, error.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fail("out of memory: fewer --num_images, a smaller --height and --width or --dtype float16 need less", FAILED)
    except OSError as error:
        if error.strerror is None:  # raised by a library for reasons of its own, not by the operating system
            raise
        fail(f"{error.strerror}: {error.filename}" if error.filename else error.strerror, FAILED)
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)


def is_out_of_memory(error: Exception) -> bool:
    """Whether host or device memory ran out; torch says the former with a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def positive_int(text: str) -> int:
    return _int_at_least(1, text)


def non_negative_int(text: str) -> int:
    return _int_at_least(0, text)


def finite_float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"must be a number, not '{text}'")
    return number


def image_size(text: str) -> int:
    """Height or width in pixels; the latents have an eighth of it."""
    size = _int_at_least(1, text)
    if size % 8:
        raise argparse.ArgumentTypeError(f"must be a multiple of 8, not {size}; {size - size % 8 or 8} is near")
    return size


def _int_at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, not '{text}'") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"must be {least} or more, not {number}")
    return number


def read_prompts(path: Path) -> list[str]:
    """The prompts in a UTF-8 text file, one on each line; empty lines count for nothing."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"prompt file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompt file {path} holds no prompt; write one on each line")
    return prompts
