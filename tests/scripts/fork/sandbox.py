"""A small world for the tests of the fork's tools: a miniature upstream wheel, a copy of the tools, an environment."""

from __future__ import annotations

import difflib
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from tests.programs import ROOT

TOOLS = (
    "apply_patch.sh",
    "scripts/fork/fork_wheel.py",
    "scripts/fork/apply_patch.py",
    "scripts/fork/edit_patches.sh",
    "scripts/fork/edit_patches.py",
)
BODY = [f"line_{number} = {number}\n" for number in range(1, 61)]
UPSTREAM = {
    "diffusers/__init__.py": '__version__ = "0.42.1"\n',
    "diffusers/attention.py": "".join(BODY),
    "diffusers/windows.py": "first = 1\r\nsecond = 2\r\nthird = 3",  # CRLF, no newline at the end
    "diffusers-0.42.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: diffusers\nVersion: 0.42.1\n\nA toy.\n",
    "diffusers-0.42.1.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
}


def edited(lines: list[str], at: int, new: str) -> list[str]:
    """`lines` with line `at` (from 1) replaced."""
    return [*lines[: at - 1], new + "\n", *lines[at:]]


def patch_text(subject: str, path: str, before: str, after: str) -> str:
    """A patch as the repository has them; its diff comes from difflib, not from git."""
    diff = difflib.unified_diff(
        before.splitlines(keepends=True), after.splitlines(keepends=True), f"a/{path}", f"b/{path}"
    )
    body = "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in diff)
    header = f"{subject}\n\nWhat: changes {path}.\n\nWhy: to see it changed.\n\nUpstream: none\n\nTest: this one\n"
    blobs = [hashlib.sha1(b"blob %d\0" % len(text.encode()) + text.encode()).hexdigest() for text in (before, after)]
    return f"{header}\ndiff --git a/{path} b/{path}\nindex {blobs[0]}..{blobs[1]} 100644\n{body}"


FIRST = "".join(edited(BODY, 10, "first = 'patched'"))
SECOND = "".join(edited(edited(FIRST.splitlines(keepends=True), 12, "second = 'patched'"), 50, "third = 'patched'"))
PATCHES = {
    "0001-patch-the-first.patch": patch_text("Patch the first", "diffusers/attention.py", "".join(BODY), FIRST),
    "0002-patch-the-second.patch": patch_text("Patch the second", "diffusers/attention.py", FIRST, SECOND),
    "0003-patch-windows.patch": patch_text(
        "Patch windows",
        "diffusers/windows.py",
        UPSTREAM["diffusers/windows.py"],
        UPSTREAM["diffusers/windows.py"].replace("second = 2", "second = 'patched'"),
    ),
    "new/diffusers/npu/__init__.py": "",
    "new/diffusers/npu/kernels.py": "ours = True\n",
}


def write_files(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text.encode())


def read_files(folder: Path) -> dict[str, bytes]:
    """All files below `folder` but git's and compiled ones."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not {".git", "__pycache__"} & set(path.parts)
    }


def make_wheel(folder: Path, files: dict[str, str]) -> Path:
    tree = folder / "tree"
    write_files(tree, files)
    subprocess.run([sys.executable, "-m", "wheel", "pack", tree, "-d", folder], check=True, capture_output=True)
    shutil.rmtree(tree)
    [wheel] = folder.glob("*.whl")
    return wheel


def make_environment(folder: Path) -> Path:
    """A virtual environment with pip and wheel, made without network; returns its interpreter."""
    venv.create(folder, with_pip=True, symlinks=True)
    [site_packages] = folder.glob("lib/python*/site-packages")
    for name in ("wheel", "packaging"):
        for part in {Path(file.parts[0]) for file in metadata.files(name) or [] if ".." not in file.parts}:
            shutil.copytree(str(metadata.distribution(name).locate_file(part)), site_packages / part)
    return folder / "bin" / "python"


@dataclass
class Sandbox:
    """A checkout with toy patches in `repo`, and the environment of `python`, which has no diffusers yet."""

    folder: Path
    python: Path
    wheel: Path

    @property
    def repo(self) -> Path:
        return self.folder / "a checkout"

    @property
    def patches(self) -> Path:
        return self.repo / "patches"

    @property
    def site_packages(self) -> Path:
        [found] = self.python.parent.parent.glob("lib/python*/site-packages")
        return found

    @property
    def environment(self) -> dict[str, str]:
        """No network, and nothing of the user's but PATH."""
        return {
            "PATH": os.environ["PATH"],
            "PYTHON": str(self.python),
            "HOME": str(self.folder / "home"),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "PIP_NO_INDEX": "1",
        }

    def set_up(self) -> None:
        for name in TOOLS:
            target = self.repo / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
        write_files(self.patches, PATCHES)
        self.pin(self.wheel)
        self.folder.joinpath("home").mkdir()

    def pin(self, wheel: Path) -> None:
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        text = f'version = "0.42.1"\nsha256 = "{digest}"\nlocal = "npu.1"\n'
        self.patches.joinpath("upstream.toml").write_text(text)

    def uninstall(self) -> None:
        for path in self.site_packages.glob("diffusers*"):
            shutil.rmtree(path)

    def run(self, script: str, *arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
        """Runs a script of the repository from an unrelated directory; `more` is added to the environment."""
        command = ["bash", str(self.repo / script), *map(str, arguments)]
        return subprocess.run(
            command, cwd=self.folder, env=self.environment | more, capture_output=True, text=True, timeout=120
        )

    def apply(self, *arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
        return self.run("apply_patch.sh", *arguments, **more)

    def edit(self, *arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
        return self.run("scripts/fork/edit_patches.sh", *arguments, **more)

    def install(self, wheel: Path) -> None:
        command = [str(self.python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
        subprocess.run(command, check=True, cwd=self.folder, env=self.environment)

    def version(self) -> str:
        """`diffusers.__version__` of a new interpreter; "" without diffusers."""
        code = "import diffusers; print(diffusers.__version__)"
        result = subprocess.run([self.python, "-I", "-c", code], capture_output=True, text=True)
        return result.stdout.strip()
