"""The fork as a wheel: a pinned upstream wheel, the patches on top of it, and the build that joins them.

    diffusers-0.42.1 (patches/upstream.toml) + patches/*.patch + patches/new/  ->  diffusers-0.42.1+npu.13

apply_patch.sh installs that wheel, scripts/fork/edit_patches.sh edits the patches. Needs git, pip and the package
`wheel`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

PATCHES = Path(__file__).resolve().parents[2] / "patches"
FINGERPRINT = "npu_patches.json"  # in the fork's dist-info: what the installed fork was made of
SOURCE_DATE_EPOCH = "315532800"  # 1980-01-01, the first instant a zip file can name


class ForkError(Exception):
    """Something the user can act on; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class Pin:
    """The upstream release that is patched, and the local version that marks the result."""

    version: str
    sha256: str
    local: str

    @property
    def fork_version(self) -> str:
        return f"{self.version}+{self.local}"

    @property
    def wheel_name(self) -> str:
        return f"diffusers-{self.version}-py3-none-any.whl"


def read_pin() -> Pin:
    return Pin(**tomllib.loads((PATCHES / "upstream.toml").read_text("utf-8")))


def patch_files(patches: Path) -> list[Path]:
    """The patches, in the order in which they apply."""
    return sorted(patches.glob("*.patch"))


def new_files(patches: Path) -> list[Path]:
    """The files that only the fork has; their paths below `patches/new` are their paths in the wheel."""
    found = (patches / "new").rglob("*")
    return sorted(path for path in found if path.is_file() and "__pycache__" not in path.parts)


def fingerprint(pin: Pin) -> dict[str, Any]:
    """What the fork is made of. Forks with equal fingerprints are equal."""
    sources = patch_files(PATCHES) + new_files(PATCHES)
    return {
        "upstream": {"version": pin.version, "sha256": pin.sha256},
        "files": {path.relative_to(PATCHES).as_posix(): sha256(path) for path in sources},
    }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- the upstream wheel ------------------------------------------------------------------------------------------


def cache_dir() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusers-npu"
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def upstream_wheel(pin: Pin, given: Path | None = None) -> Path:
    """The pinned upstream wheel, with its sha256 checked: `given` when there is one, else the cached one, else pip's.

    Returns its path in the cache, so that a later build or `--revert` needs neither network nor `given`.
    """
    cached = cache_dir() / pin.wheel_name
    if given is None and cached.exists() and sha256(cached) == pin.sha256:
        return cached
    with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
        fetched = Path(scratch) / pin.wheel_name
        if given is None:
            download(pin, fetched.parent)
        elif given.is_file():
            shutil.copyfile(given, fetched)
        else:
            raise ForkError(f"--wheel {given}: there is no such file")
        found = sha256(fetched)
        if found != pin.sha256:
            raise ForkError(
                f"{given or pin.wheel_name} is not the wheel that the patches are for: its sha256 is {found}, "
                f"patches/upstream.toml pins {pin.sha256}"
            )
        fetched.replace(cached)
    return cached


def download(pin: Pin, folder: Path) -> None:
    requirement = f"diffusers=={pin.version}"
    try:
        pip(["download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement], folder)
    except ForkError as error:
        raise ForkError(f"{error}\nWithout network, fetch {pin.wheel_name} elsewhere and pass --wheel FILE") from error


def pip(arguments: list[str], folder: Path) -> None:
    """Runs this interpreter's pip, from `folder` so that nothing in the current directory can pass for a package."""
    command = [sys.executable, "-E", "-m", "pip", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        tail = "\n".join((result.stdout + result.stderr).strip().splitlines()[-15:])
        raise ForkError(f"pip {arguments[0]} failed:\n{tail}")


# --- the build ---------------------------------------------------------------------------------------------------


def build_wheel(pin: Pin, upstream: Path, folder: Path) -> Path:
    """Builds the fork's wheel into `folder` and returns its path. The same sources give the same bytes."""
    with tempfile.TemporaryDirectory() as scratch:
        tree, packed = Path(scratch, "tree"), Path(scratch, "packed")
        packed.mkdir()
        unpack(upstream, tree)
        for patch in patch_files(PATCHES):
            apply_patch(patch, tree)
        add_new_files(PATCHES, tree)
        set_version(pin, tree)
        for path in tree.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        command = [sys.executable, "-E", "-m", "wheel", "pack", str(tree), "--dest-dir", str(packed)]
        environment = os.environ | {"SOURCE_DATE_EPOCH": SOURCE_DATE_EPOCH}
        result = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)
        if result.returncode:
            raise ForkError(f"wheel pack failed:\n{result.stderr.strip()}")
        [wheel] = packed.iterdir()
        return publish(wheel, folder)


def publish(wheel: Path, folder: Path) -> Path:
    """Copies `wheel` into `folder` in one step: a reader sees the old file or the new one, never a part."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        return Path(shutil.copyfile(wheel, Path(scratch, wheel.name))).replace(folder / wheel.name)


def unpack(upstream: Path, tree: Path) -> None:
    with zipfile.ZipFile(upstream) as archive:
        archive.extractall(tree)


def apply_patch(patch: Path, tree: Path) -> None:
    """Applies `patch` to `tree`, every hunk at exactly the line that it names."""
    result = run_git(tree, "apply", "--verbose", "--reject", "--whitespace=nowarn", str(patch.resolve()))
    problems = rejected(result.stderr.decode())
    if result.returncode or problems:
        details = "\n".join(f"  {problem}" for problem in problems)
        raise ForkError(
            f"{patch.name} does not apply to what comes before it:\n{details}\n"
            "patches/README.md says how patches are edited"
        )


def rejected(report: str) -> list[str]:
    """What `git apply --verbose --reject` complains of, one line for each hunk or file.

    git accepts a hunk that fits at another line than its own; in code as repetitive as pipelines that may be the
    wrong place, so it counts as a complaint here. So does a file that git skips.
    """
    problems, file = [], ""
    for line in report.splitlines():
        if match := re.match(r"(?:Checking|Applying) patch (.+?)(?: with \d+ rejects?)?\.\.\.$", line):
            file = match[1]
        elif match := re.match(r"Rejected hunk #(\d+)", line):
            problems.append(f"{file}: hunk {match[1]} does not match")
        elif match := re.match(r"Hunk #(\d+) succeeded at (\d+) \(offset", line):
            problems.append(f"{file}: hunk {match[1]} matches only at line {match[2]}, not at the line it names")
        elif line.startswith("Skipped patch") or (line.startswith("error: ") and "while searching" not in line):
            problems.append(line.removeprefix("error: "))
    return problems


def run_git(tree: Path, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Runs git in `tree` alone: no repository around it and none of the user's settings change what git does."""
    if shutil.which("git") is None:
        raise ForkError("git is not installed; the patches are applied with it")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {
        "GIT_CEILING_DIRECTORIES": str(tree.resolve().parent),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_ATTR_NOSYSTEM": "1",
        "HOME": os.devnull,
        "XDG_CONFIG_HOME": os.devnull,
        "LC_ALL": "C",
    }
    return subprocess.run(["git", *arguments], cwd=tree, env=environment, input=stdin, capture_output=True)


def add_new_files(patches: Path, tree: Path) -> None:
    for source in new_files(patches):
        target = tree / source.relative_to(patches / "new")
        if target.exists():
            raise ForkError(f"{source} exists upstream; make the change a patch")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def set_version(pin: Pin, tree: Path) -> None:
    """Names the fork in its metadata and in `diffusers.__version__`, and records what it was made of."""
    metadata = tree / f"diffusers-{pin.version}.dist-info"
    replace_once(metadata / "METADATA", f"Version: {pin.version}\n", f"Version: {pin.fork_version}\n")
    replace_once(
        tree / "diffusers" / "__init__.py", f'__version__ = "{pin.version}"\n', f'__version__ = "{pin.fork_version}"\n'
    )
    recorded = json.dumps(fingerprint(pin), indent=1) + "\n"
    metadata.joinpath(FINGERPRINT).write_text(recorded, "utf-8")
    metadata.rename(tree / f"diffusers-{pin.fork_version}.dist-info")


def replace_once(path: Path, old: str, new: str) -> None:
    text = path.read_bytes().decode()
    if text.count(old) != 1:
        raise ForkError(f"{path.name} should say {old.strip()!r} once, it does so {text.count(old)} times")
    path.write_bytes(text.replace(old, new).encode())


# --- the command line --------------------------------------------------------------------------------------------


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one line for an error instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def require_modules(*names: str) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        advice = "-m ensurepip" if "pip" in missing else "-m pip install -r requirements.txt"
        raise ForkError(f"{sys.executable} lacks {' and '.join(missing)}; run: {sys.executable} {advice}")


def run_command(name: str, command: Callable[[], int]) -> NoReturn:
    """Runs `command` and exits with what it returns; an expected failure is one message and exit code 1."""
    try:
        sys.exit(command())
    except (ForkError, OSError) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
