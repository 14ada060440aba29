"""Installs the fork into the running interpreter's environment, reports its state, or puts upstream back."""

from __future__ import annotations

import argparse
import enum
import fcntl
import json
import signal
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts.fork.fork_wheel import (
    FINGERPRINT,
    ArgumentParser,
    ForkError,
    Pin,
    build_wheel,
    cache_dir,
    fingerprint,
    pip,
    read_pin,
    require_modules,
    run_command,
    upstream_wheel,
)


class State(enum.Enum):
    """What the environment holds; the value is the exit code of --check."""

    PATCHED = 0
    NOT_INSTALLED = 3
    UPSTREAM = 4
    OUT_OF_DATE = 5
    OTHER = 6


DESCRIPTION = """\
Builds the wheel diffusers-{fork}, which is upstream's wheel of diffusers {upstream}
with patches/ applied, and installs it into the environment of this Python:
  {python}
Another environment: activate it first, or set PYTHON=/path/to/python.
An installed package is never edited in place; on any error the environment stays as it was.
"""

EPILOG = """\
exit codes of --check:
  0 patched            the fork, made of the patches in this checkout
  3 not installed      no diffusers here
  4 upstream           diffusers {upstream} as published
  5 out of date        the fork, but made of other patches; run apply_patch.sh again
  6 other version      any other diffusers; apply_patch.sh leaves it alone
Otherwise: 0 done or nothing to do, 1 failed, 2 wrong usage.

examples:
  bash apply_patch.sh                                  install, or do nothing when up to date
  bash apply_patch.sh --wheel diffusers-{upstream}-py3-none-any.whl   the same without network
  bash apply_patch.sh --build-only dist                only build the wheel, to install elsewhere
  bash apply_patch.sh --revert                         back to upstream

The upstream wheel is kept in ${{XDG_CACHE_HOME:-~/.cache}}/diffusers-npu, so a later build needs no network.
"""


def parse_arguments(pin: Pin) -> argparse.Namespace:
    names = {"fork": pin.fork_version, "upstream": pin.version, "python": sys.executable}
    parser = ArgumentParser(
        prog="apply_patch.sh",
        description=DESCRIPTION.format(**names),
        epilog=EPILOG.format(**names),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="print the state of the environment and change nothing")
    action.add_argument("--revert", action="store_true", help=f"install upstream's diffusers {pin.version} again")
    action.add_argument("--build-only", metavar="DIR", type=Path, help="build the wheel into DIR, install nothing")
    parser.add_argument("--wheel", metavar="FILE", type=Path, help="upstream's wheel, instead of asking pip for it")
    arguments = parser.parse_args()
    if arguments.check and arguments.wheel:
        parser.error("--check needs no --wheel")
    return arguments


def find_state(pin: Pin) -> tuple[State, str]:
    """The state of this environment, and the version of diffusers in it ("" when there is none)."""
    try:
        diffusers = metadata.distribution("diffusers")
    except metadata.PackageNotFoundError:
        return State.NOT_INSTALLED, ""
    made_of = diffusers.read_text(FINGERPRINT)
    if made_of is not None:
        current = diffusers.version == pin.fork_version and json.loads(made_of) == fingerprint(pin)
        return State.PATCHED if current else State.OUT_OF_DATE, diffusers.version
    origin = json.loads(diffusers.read_text("direct_url.json") or "{}")
    published = "dir_info" not in origin and "vcs_info" not in origin  # not somebody's checkout that says 0.42.1
    return State.UPSTREAM if diffusers.version == pin.version and published else State.OTHER, diffusers.version


def describe(state: State, version: str, pin: Pin) -> str:
    return {
        State.PATCHED: f"diffusers {version} is installed: patched, up to date",
        State.NOT_INSTALLED: "diffusers is not installed",
        State.UPSTREAM: f"diffusers {version} is installed: upstream, not patched",
        State.OUT_OF_DATE: f"diffusers {version} is installed: patched, but out of date with patches/",
        State.OTHER: f"diffusers {version} is installed: other version, neither upstream {pin.version} nor the fork",
    }[state]


def refuse_other_version(state: State, version: str, pin: Pin) -> None:
    if state is State.OTHER:
        raise ForkError(
            f"{describe(state, version, pin)}. It is left alone; "
            f"to go on, run: {sys.executable} -m pip install diffusers=={pin.version}"
        )


def apply(pin: Pin, wheel: Path | None) -> None:
    state, version = find_state(pin)
    if state is State.PATCHED:
        print(f"{describe(state, version, pin)}. Nothing to do.")
        return
    refuse_other_version(state, version, pin)
    with tempfile.TemporaryDirectory() as scratch:
        built = build_wheel(pin, upstream_wheel(pin, wheel), Path(scratch))
        install(built, State.PATCHED)
    print(f"Installed diffusers {pin.fork_version}.")
    if state is State.NOT_INSTALLED:
        print("Its dependencies are not part of this: pip install -r requirements.txt")


def revert(pin: Pin, wheel: Path | None) -> None:
    state, version = find_state(pin)
    refuse_other_version(state, version, pin)
    if state in (State.NOT_INSTALLED, State.UPSTREAM):
        print(f"{describe(state, version, pin)}. Nothing to revert.")
        return
    install(upstream_wheel(pin, wheel), State.UPSTREAM)
    print(f"Installed upstream's diffusers {pin.version}.")


def install(wheel: Path, expected: State) -> None:
    """Puts `wheel` in the place of the installed diffusers, then asks a new interpreter what it sees."""
    with zipfile.ZipFile(wheel) as archive:
        targets = [Path(sysconfig.get_path("purelib"), name) for name in archive.namelist()]
    absent = [target for target in targets if not target.exists()]
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # pip killed halfway leaves half a package
    try:
        pip(["install", "--no-deps", "--no-index", "--force-reinstall", str(wheel)], wheel.parent)
    except ForkError:
        remove(absent)  # pip brings back what it had removed, but leaves what it had added
        raise
    finally:
        signal.signal(signal.SIGINT, on_interrupt)
    check = subprocess.run([sys.executable, "-E", "-B", __file__, "--check"], capture_output=True, text=True)
    if check.returncode != expected.value:
        raise ForkError(
            f"pip installed {wheel.name}, but {sys.executable} does not see it: {check.stdout}{check.stderr}"
            "PIP_TARGET, PIP_PREFIX or PIP_USER may have sent it elsewhere"
        )


def remove(files: list[Path]) -> None:
    """Removes the files that are there, and the folders that this leaves empty."""
    for file in files:
        file.unlink(missing_ok=True)
    for folder in sorted({file.parent for file in files}, reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def only_one_at_a_time() -> Iterator[None]:
    """Holds a lock, so that two runs do not install into one environment at once."""
    with open(cache_dir() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> int:
    pin = read_pin()
    arguments = parse_arguments(pin)
    if arguments.check:
        state, version = find_state(pin)
        print(f"{sys.executable}: {describe(state, version, pin)}")
        return state.value
    require_modules("pip", "wheel")
    if arguments.build_only:
        print(build_wheel(pin, upstream_wheel(pin, arguments.wheel), arguments.build_only))
        return 0
    print(f"Python: {sys.executable}", flush=True)
    with only_one_at_a_time():
        if arguments.revert:
            revert(pin, arguments.wheel)
        else:
            apply(pin, arguments.wheel)
    return 0


if __name__ == "__main__":
    run_command("apply_patch.sh", main)
