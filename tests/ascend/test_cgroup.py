"""The memory that a control group leaves, as the kernel's files of both versions say it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from ascend import cgroup
from ascend.memory import read_memory

MIB = 2**20


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    monkeypatch.setattr(cgroup, "MEMBERSHIP", tmp_path / "membership")
    return tmp_path


def write_group(folder: Path, version: cgroup.Version, limit: int | str, usage: int, droppable: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / version.limit).write_text(f"{limit}\n")
    (folder / version.usage).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{version.droppable} {droppable}\n")


@pytest.mark.parametrize("version", [cgroup.V1, cgroup.V2], ids=["version 1", "version 2"])
def test_a_limit_of_the_group_is_the_total_and_pages_that_can_go_are_free(root: Path, version: cgroup.Version) -> None:
    is_first = version is cgroup.V1
    # As on hosts that have both: only one of them governs memory, and the group of another controller does not count.
    (root / "membership").write_text("5:cpu:/other\n4:memory:/box\n0::/\n" if is_first else "0::/box\n")
    write_group(root / "memory/other", cgroup.V1, MIB, 0, 0)
    write_group(root / "memory/box" if is_first else root / "box", version, 50 * MIB, 30 * MIB, 10 * MIB)
    memory = read_memory(torch.device("cpu"))
    assert memory["total"] == 50 * MIB
    assert memory["free"] == 30 * MIB


def test_a_group_around_it_limits_a_group_too(root: Path) -> None:
    (root / "membership").write_text("0::/pod/box\n")
    write_group(root / "pod/box", cgroup.V2, "max", 2 * MIB, 0)
    write_group(root / "pod", cgroup.V2, 40 * MIB, 41 * MIB, 0)
    assert cgroup.read_allowances() == [(40 * MIB, 0)]
    assert read_memory(torch.device("cpu"))["total"] == 40 * MIB


def test_a_container_that_sees_its_own_group_as_the_root_finds_its_limit(root: Path) -> None:
    (root / "membership").write_text("0::/system.slice/docker-1.scope\n")
    write_group(root, cgroup.V2, 40 * MIB, MIB, 0)
    assert cgroup.read_allowances() == [(40 * MIB, 39 * MIB)]


@pytest.mark.parametrize("membership", [None, "0::/box\n"])
def test_without_a_limit_the_numbers_are_the_machines(root: Path, membership: str | None) -> None:
    if membership:
        (root / "membership").write_text(membership)
        write_group(root / "box", cgroup.V2, "max", MIB, 0)
    assert cgroup.read_allowances() == []

    assert read_memory(torch.device("cpu"))["total"] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
