"""Damaged files, full and vanished folders, forks and interrupts: one error, and a store that loses nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ascend import Tier, TieredStore
from ascend.tiers import DamagedFileError, TierError, media
from tests.programs import ROOT, environment
from tests.tier_work import files, random_tensor, same_bits

KIB, MIB = 2**10, 2**20


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "is damaged"),
        (lambda file: os.truncate(file, file.stat().st_size - 1), "is damaged"),
        (lambda file: os.truncate(file, 0), "is damaged"),
        (lambda file: file.write_bytes(file.read_bytes() + b"x"), "is damaged"),
        (Path.unlink, "cannot be read .No such file or directory."),
    ],
)
def test_a_damaged_file_is_one_error_and_the_others_go_on(tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    tensors = {key: random_tensor(ord(key), KIB) for key in "abc"}
    with TieredStore([Tier("cpu", KIB), Tier(tmp_path, MIB)]) as store:
        for key, tensor in tensors.items():
            store.put(key, tensor)
        file = next(file for file in files(tmp_path) if same_bits(load_file(file)["tensor"], tensors["a"]))
        damage(file)
        for use in (store.get, lambda key: store.prefetch([key])):
            with pytest.raises(DamagedFileError, match=f"{file.name} {message}.*: put its tensor again"):
                use("a")
        for key in "bcbc":
            assert same_bits(store.get(key), tensors[key])
        store.put("a", tensors["a"])
        assert all(same_bits(store.get(key), tensors[key]) for key in "abc")


def test_a_folder_that_is_gone_is_one_error_and_nothing_in_memory_is_lost(tmp_path: Path) -> None:
    with TieredStore([Tier("cpu", 1000), Tier(tmp_path, MIB)]) as store:
        store.put("a", torch.ones(250))
        store.put("b", torch.ones(250))
        shutil.rmtree(tmp_path)
        with pytest.raises(TierError, match="cannot be written .No such file or directory."):
            store.put("c", torch.ones(250))
        assert store.get("b").sum() == 250
        with pytest.raises(DamagedFileError, match="cannot be read"):
            store.get("a")
        store.remove("a")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/folder")):
        with pytest.raises(TierError, match=f"{folder} cannot hold a tier .*: take one you can write to"):
            TieredStore([Tier(folder, MIB)])


def test_a_folder_that_becomes_read_only() -> None:
    """As an ordinary user: the superuser may write wherever nobody else may."""
    program = """
        if os.geteuid() == 0:
            os.chown(folder, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
        store = TieredStore([Tier("cpu", 1000), Tier(folder, 2**20)])
        store.put("a", torch.full((250,), 1.0))
        store.put("b", torch.full((250,), 2.0))
        (own,) = folder.iterdir()
        own.chmod(0o500)
        try:
            store.put("c", torch.ones(250))
        except TierError as error:
            print(error)
        print([store.get(key)[0].item() for key in "abab"])
        own.chmod(0o700)
        store.close()
    """
    # Not in tmp_path, whose folders each start of pytest makes its user's alone.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(os.path.realpath(name))
        said = run(program, folder).splitlines()
        assert "cannot be written (Permission denied): nothing is lost" in said[0]
        assert said[1] == "[1.0, 2.0, 1.0, 2.0]"
        assert not list(folder.iterdir())


def start(program: str, folder: Path) -> subprocess.Popen[str]:
    head = "import os, sys, torch\nfrom pathlib import Path\nfrom ascend.tiers import *\nfolder = Path(sys.argv[1])\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(program), str(folder)],
        cwd=ROOT,
        env=environment(TORCH_DEVICE_BACKEND_AUTOLOAD="0"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(program: str, folder: Path) -> str:
    process = start(program, folder)
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    return said


def test_a_full_disk_is_one_error_and_nothing_is_lost(tmp_path: Path) -> None:
    """No file may become larger than 2000 bytes, so that a write fails when half of it is done, as on a full disk.

    In a process of its own: such a limit also holds for the file that a test run is written to.
    """
    said = run(
        """
        import logging, resource
        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        tensors = {"small": torch.randn(256), "large": torch.randn(1024), "new": torch.randn(1024)}
        with TieredStore([Tier("cpu", 4608), Tier(folder, 2**20)]) as store:
            store.put("small", tensors["small"])
            store.put("large", tensors["large"])
            try:
                store.put("new", tensors["new"])
            except TierError as error:
                print(error)
            print([path.suffix for path in folder.rglob("*") if path.is_file() and path.suffix])
            print([torch.equal(store.get(key), tensors[key]) for key in ("large", "small")])
        """,
        tmp_path,
    ).splitlines()
    assert "1.safetensors cannot be written (File too large): nothing is lost, make room there" in said[0]
    assert said[1] == "['.safetensors']"
    assert f"'small' stays in {tmp_path}: " in said[2] and "cannot be written" in said[2]
    assert said[3] == "[True, True]"


def test_a_forked_child_leaves_its_parents_files_alone(tmp_path: Path) -> None:
    said = run(
        """
        store = TieredStore([Tier("cpu", 1000), Tier(folder, 2**20)])
        for value in range(3):
            store.put(str(value), torch.full((250,), float(value)))
        store._lock.acquire()  # as a thread may have, at the fork; the child has no such thread
        child = os.fork()
        if not child:
            for call in (lambda: store.get("0"), lambda: store.remove("0"), lambda: store.put("0", torch.ones(3))):
                try:
                    call()
                except TierError as error:
                    print(str(error).replace(str(os.getppid()), "PARENT"))
            with TieredStore([Tier(folder, 2**20)]) as own:
                own.put("x", torch.ones(3))
            store.close()
            sys.exit()  # not os._exit: what is to be done at exit is done
        assert os.waitpid(child, 0)[1] == 0
        store._lock.release()
        print([store.get(str(value))[0].item() for value in range(3)])
        """,
        tmp_path,
    )
    refusal = "this store is of process PARENT: make one in each process, after the fork"
    assert said.splitlines() == [refusal] * 3 + ["[0.0, 1.0, 2.0]"]
    assert not list(tmp_path.iterdir())  # the parent removed them at its exit


WRITES_FOREVER = """
    import signal
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run in the background, it is ignored
    store = TieredStore([Tier(folder, 2**30)])
    store.put("x", torch.ones(2**20))
    print("started", flush=True)
    while True:
        store.put("x", torch.ones(2**20))
"""


def test_ctrl_c_leaves_no_file(tmp_path: Path) -> None:
    process = start(WRITES_FOREVER, tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    assert files(tmp_path)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate()[1]
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_store_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(tensor: torch.Tensor) -> None:
        raise KeyboardInterrupt

    x = random_tensor(0, 1000)
    with TieredStore([Tier("cpu", 1000), Tier(tmp_path, MIB)]) as store:
        store.put("x", x)
        before = store.stats()
        with monkeypatch.context() as patch:
            patch.setattr(media, "_bytes", interrupt)
            with pytest.raises(KeyboardInterrupt):
                store.put("y", random_tensor(1, 1000))
        assert store.stats() == before and not files(tmp_path)
        assert same_bits(store.get("x"), x)


def test_stores_share_a_folder_and_clear_away_what_a_killed_one_left(tmp_path: Path) -> None:
    process = start(WRITES_FOREVER, tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    (other,) = tmp_path.iterdir()
    with TieredStore([Tier(tmp_path, MIB)]) as one, TieredStore([Tier(tmp_path, MIB)]) as two:
        one.put("x", torch.zeros(3))
        two.put("x", torch.ones(3))
        assert one.get("x").sum() == 0 and two.get("x").sum() == 3
        assert process.poll() is None and (other / media.LOCK).exists()
        assert len(list(tmp_path.iterdir())) == 3
    process.kill()
    process.communicate()
    assert list(tmp_path.iterdir()) == [other] and files(other)
    with TieredStore([Tier(tmp_path, MIB)]):
        assert not other.exists()
