"""The memory that Linux lets this process' control group have, which in a container is less than the machine's."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

MEMBERSHIP = Path("/proc/self/cgroup")
ROOT = Path("/sys/fs/cgroup")


class Version(NamedTuple):
    """What the kernel calls its files, and the figure of pages that it drops before it refuses memory.

    See cgroup-v2.rst and cgroup-v1/memory.rst in the kernel's admin-guide.
    """

    limit: str
    usage: str
    droppable: str


V1 = Version("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = Version("memory.max", "memory.current", "inactive_file")


class Allowance(NamedTuple):
    """Bytes that a group may hold, and that it may still take."""

    total: int
    free: int


def read_allowances() -> list[Allowance]:
    """Of this process' group and of each group around it, as far as they are limited; empty where none is.

    The kernel's "no limit" of version 1 is a number too, larger than any machine's memory.
    """
    try:
        lines = MEMBERSHIP.read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return []
    found = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "memory" not in controllers.split(","):
            continue
        root, version = (ROOT / "memory", V1) if controllers else (ROOT, V2)
        group = Path(path.strip("/"))
        found += [_read_allowance(root / folder, version) for folder in (group, *group.parents)]
    return [allowance for allowance in found if allowance is not None]


def _read_allowance(folder: Path, version: Version) -> Allowance | None:
    """None where the group is not limited, or not seen: a container often sees its own group as the root."""
    try:
        limit = int((folder / version.limit).read_text())
        used = int((folder / version.usage).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # ValueError: version 2 says "max"
        return None
    droppable = int(statistics.get(version.droppable, 0))
    return Allowance(limit, max(0, limit - used + droppable))
