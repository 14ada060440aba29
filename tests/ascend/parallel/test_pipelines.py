"""Every pipeline of Stable Diffusion on two ranks."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from runners.cli import RankFailedError
from runners.launch import launch, result_of_ranks
from tests.programs import ROOT
from tests.tiny_pipelines import PIPELINES


def test_two_ranks_draw_each_pipelines_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script = Path(__file__).with_name("pipeline_ranks.py")
    found = result_of_ranks([0, 1], [str(script), "cpu"])
    assert set(found) == {*PIPELINES, "HiDream editing"}
    assert max(found.values()) < 1e-3, found  # of float32, summed in batches of another size


def test_a_launch_leaves_the_environment_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the next may take other devices."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os, pathlib, sys\n"
        "pathlib.Path(sys.argv[-1]).write_text(os.environ['WORLD_SIZE'] + os.environ['OMP_NUM_THREADS'])\n"
    )
    before, handler = dict(os.environ), signal.getsignal(signal.SIGINT)
    assert [result_of_ranks(devices, [str(script)]) for devices in ([0], [0, 1])] == [11, 21]
    assert dict(os.environ) == before and signal.getsignal(signal.SIGINT) is handler


def test_a_failure_is_told_by_its_own_log_and_not_by_an_earlier_one(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("import os, sys\nif os.environ['RANK'] == '1':\n    sys.exit(f'error: {sys.argv[1]}')\n")
    for reason in ("one", "two", "three", "four"):
        with pytest.raises(RankFailedError, match=f": {reason}$"):
            launch([0, 1], tmp_path / "logs", [str(script), reason])
