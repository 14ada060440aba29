"""Each program explains itself, from whatever folder it is started."""

from __future__ import annotations

import pytest

from tests.programs import ROOT, run_forked

IMPORTS = ("torch", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")


@pytest.mark.parametrize("folder", ["scripts", "examples"])
def test_help_teaches(folder: str) -> None:
    programs = sorted(
        path
        for path in (ROOT / folder).rglob("*.py")
        if 'if __name__ == "__main__"' in path.read_text() and path.name != "gather.py"  # which ranks alone start
    )
    assert programs
    for program, done in zip(
        programs, run_forked([([path, "--help"], {}) for path in programs], IMPORTS), strict=True
    ):
        assert done.returncode == 0, f"{program}: {done.stderr}"
        assert done.stdout.startswith("usage:"), program
