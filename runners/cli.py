"""What every runner's command line shares: one-line errors, argument types, prompts."""

import argparse
import math
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from ascend.device import DeviceError
from ascend.parallel import ParallelError, world_size

BAD_INPUT = 2
FAILED = 1
INTERRUPTED = 128 + signal.SIGINT  # as a shell says of a command ended by a signal
TERMINATED = 128 + signal.SIGTERM


class UserError(Exception):
    """Something the user can put right; the message says what is wrong, with which value, and what to do."""


class RankFailedError(Exception):
    """A rank failed, and the others have been ended."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Terminated(BaseException):
    """SIGTERM: like KeyboardInterrupt, no error that a program should handle and go on."""


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
        with sigterm_raises():
            yield
    except (UserError, DeviceError, ParallelError) as error:
        fail(error, BAD_INPUT)
    except RankFailedError as error:
        fail(error, error.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fail("out of memory: smaller pictures, fewer at a time, --dtype float16 or --memory stream need less", FAILED)
    except OSError as error:
        if error.strerror is None:  # raised by a library for reasons of its own, not by the operating system
            raise
        fail(f"{error.strerror}: {error.filename}" if error.filename else error.strerror, FAILED)
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except Terminated:
        fail("terminated by SIGTERM", TERMINATED)


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Let SIGTERM raise Terminated in the main thread, so that what is half done is put right on the way out.

    Not in one of several ranks: it may wait in C++ for another, where no handler runs, and has to end at once.
    """
    if world_size() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def raise_terminated(*_: Any) -> NoReturn:
    raise Terminated


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


def is_finite_number(value: object) -> bool:
    """Of what a JSON file says, where true and false are no numbers."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def positive_float(text: str) -> float:
    number = finite_float(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"must be more than 0, not {text}")
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


def text(argument: str) -> str:
    """What goes into pictures and reports. Bytes that are no UTF-8 reach Python as lone surrogates."""
    try:
        argument.encode()
    except UnicodeEncodeError as error:
        byte = ord(argument[error.start]) - 0xDC00
        raise argparse.ArgumentTypeError(
            f"must be UTF-8 text, and has the byte 0x{byte:02x} after {error.start} characters: "
            f"{argument.encode(errors='backslashreplace').decode()[:60]}"
        ) from None
    return argument


def file_path(argument: str) -> Path:
    """A path, with ~ for the home directory also where the shell leaves it, as in --output_dir=~/pictures."""
    try:
        return Path(text(argument)).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"'{argument}': {error}") from None


def read_prompts(path: Path) -> list[str]:
    """The prompts in a UTF-8 text file, one on each line; empty lines count for nothing."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines splits at U+2028 and form feeds too
    except OSError as error:
        raise UserError(f"prompt file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompt file {path} holds no prompt; write one on each line")
    return prompts
