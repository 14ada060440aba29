"""One JSON file with what a maintainer needs to know of a machine, and no secrets: no user, host or other paths than
those of the software, and of the environment only variables of the software below."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scripts.npu_setup.checks import Result

VARIABLES = re.compile(
    r"(ASCEND|ACL|ASDOPS|ATB|CANN|CUDA|DIFFUSERS|HCCL|HCCN|INF_NAN|LD_LIBRARY|MULTI_STREAM|NCCL|NPU|OMP|PREFERRED|PYTHONPATH"
    r"|PYTORCH|TASK_QUEUE|THP|TOOLCHAIN|TORCH)"
)
CREDENTIALS = re.compile(r"(?<=://)[^/@\s\"]+@")  # in an address
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH|COOKIE|PROXY", re.IGNORECASE)
DRIVER_FILES = ("/usr/local/Ascend/driver/version.info", "/usr/local/Ascend/firmware/version.info")
DRIVER_COMMANDS = (("npu-smi", "info"), ("nvidia-smi", "-L"))
PATIENCE = 60  # seconds; a hung driver hangs its tools


def collect(results: Sequence[Result]) -> dict[str, Any]:
    return {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "results": [asdict(result) for result in results],
        "machine": machine(),
        "packages": {package.name: package.version for package in importlib.metadata.distributions()},
        "environment": environment(),
        "driver": driver(),
    }


def write(path: Path, bundle: dict[str, Any]) -> None:
    """Write `bundle` as a whole or not at all. Raises OSError."""
    text = json.dumps(bundle, indent=2, sort_keys=True, ensure_ascii=False)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(CREDENTIALS.sub("", _without_home(text)) + "\n", encoding="utf-8")
    partial.replace(path)


def machine() -> dict[str, Any]:
    found = {"system": platform.system(), "kernel": platform.release(), "architecture": platform.machine()}
    release = platform.freedesktop_os_release() if Path("/etc/os-release").exists() else {}
    found |= {"distribution": release.get("PRETTY_NAME", ""), "libc": " ".join(platform.libc_ver())}
    return found | {"python": sys.version, "cores": str(os.cpu_count()), "devices": device_nodes()}


def device_nodes() -> list[str]:
    return sorted(str(path) for path in Path("/dev").glob("davinci*"))


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if VARIABLES.match(name) and not SECRET.search(name)}


def driver() -> dict[str, str]:
    """What the driver's files and tools say, by their names; of those that are absent, nothing."""
    found = {name: Path(name).read_text(errors="replace") for name in DRIVER_FILES if Path(name).is_file()}
    for command in DRIVER_COMMANDS:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        except FileNotFoundError:
            continue
        except subprocess.TimeoutExpired:
            found[" ".join(command)] = f"no answer in {PATIENCE} s"
        else:
            found[" ".join(command)] = done.stdout + done.stderr
    return found


def _without_home(text: str) -> str:
    home = str(Path.home())
    return text if home == "/" else re.sub(rf"{re.escape(home)}(?![\w-])", "~", text)
