"""Graphs on disk: whole or absent, made by one process, and not too many."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from ascend.graphs.store import DAY, INDEX, PART, UNUSED_DAYS, GraphStore
from tests.programs import ROOT

# Makes the entry "graph" unless it is there, and prints which of both it was. With a second argument it says that it
# has written half, and waits to be killed.
PROGRAM = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from ascend.graphs.store import GraphStore

    store = GraphStore(Path(sys.argv[1]))
    with store.locked("graph"):
        entry = store.find("graph")
        if entry is None:
            with store.make("graph", {}) as folder:
                (folder / "half").write_text("first")
                if sys.argv[2:]:
                    print("half", flush=True)
                    time.sleep(600)
                (folder / "rest").write_text("second")
            entry = store.find("graph")
            print("made")
        assert (entry / "half").read_text() + (entry / "rest").read_text() == "firstsecond"
    """
)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(folder), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def add(store: GraphStore, name: str, size: int = 1, age: float = 0) -> Path:
    with store.locked(name), store.make(name, {"of": name}) as folder:
        (folder / "data").write_bytes(b"x" * size)
    entry = store.folder / name
    used = time.time() - age
    if entry.exists():
        os.utime(entry / INDEX, (used, used))
    return entry


def test_of_four_processes_that_start_together_one_makes_the_graph(tmp_path: Path) -> None:
    processes = [start(tmp_path) for _ in range(4)]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sorted(said) == ["", "", "", "made\n"]


def test_a_process_that_is_killed_while_it_writes_leaves_no_half_graph(tmp_path: Path) -> None:
    killed = start(tmp_path, "half")
    assert killed.stdout is not None and killed.stdout.readline() == "half\n"
    waiting = start(tmp_path)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert waiting.communicate()[0] == "made\n" and waiting.returncode == 0
    assert not list(tmp_path.glob(f"*{PART}"))


def test_an_entry_whose_folder_is_removed_while_it_is_made_is_not_there(tmp_path: Path) -> None:
    store = GraphStore(tmp_path)
    with store.locked("graph"), store.make("graph", {}) as folder:
        folder.rmdir()  # as of a graph that torchair cannot keep
    with store.locked("graph"):
        assert store.find("graph") is None


def test_an_entry_that_fails_is_not_there(tmp_path: Path) -> None:
    store = GraphStore(tmp_path)
    with pytest.raises(ZeroDivisionError), store.locked("a"), store.make("a", {}) as folder:
        (folder / "data").write_text("half")
        raise ZeroDivisionError
    assert store.find("a") is None and not list(tmp_path.glob(f"*{PART}"))


@pytest.mark.parametrize("damage", ["cut", "gone", "no index"])
def test_a_damaged_entry_is_not_found_and_can_be_made_again(tmp_path: Path, damage: str) -> None:
    store = GraphStore(tmp_path)
    entry = add(store, "a", size=100)
    assert store.find("a") == entry
    file = entry / (INDEX if damage == "no index" else "data")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:50])
    else:
        file.unlink()
    assert store.find("a") is None
    add(store, "a", size=100)
    assert store.find("a") == entry


def test_the_longest_unused_go_first_when_there_are_too_many(tmp_path: Path) -> None:
    store = GraphStore(tmp_path, limit=5000)
    oldest, used, newest = (add(store, name, 1500, age) for name, age in (("a", 300), ("b", 200), ("c", 100)))
    assert store.find("a") == oldest  # which makes "b" the longest unused
    latest = add(store, "d", 1500)
    assert [entry.exists() for entry in (oldest, used, newest, latest)] == [True, False, True, True]


def test_what_nobody_used_for_long_goes(tmp_path: Path) -> None:
    store = GraphStore(tmp_path)
    old = add(store, "a", age=(UNUSED_DAYS + 1) * DAY)
    add(store, "b")
    assert not old.exists()


def test_an_entry_in_use_and_the_newest_stay_whatever_the_limit(tmp_path: Path) -> None:
    store = GraphStore(tmp_path, limit=0)
    entry = add(store, "a", 10)
    with store.locked("a"):
        assert add(store, "b").exists()
        assert entry.exists()
    add(store, "c")
    assert not entry.exists()


def test_what_a_killed_process_left_of_another_graph_is_removed(tmp_path: Path) -> None:
    (tmp_path / f"a{PART}").mkdir()
    (tmp_path / f"a{PART}" / "data").write_bytes(b"x" * 100)
    add(GraphStore(tmp_path, limit=5000), "b")
    assert not (tmp_path / f"a{PART}").exists()
