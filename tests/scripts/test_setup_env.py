"""setup_env.sh installs once, again after a change or a failure, else nothing; here with a pretend pip."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import ROOT

# A Python that writes down what it is asked to install and lives in its own prefix.
PYTHON = f"""#!/usr/bin/env bash
case "$*" in
    "-m pip install"*) file=${{@: -1}}; echo "$file" >>"$PREFIX/installed"; cat "$file" >"$PREFIX/wanted"
        [[ ! -e $PREFIX/offline ]] ;;
    "-m compileall"*) ;;
    *sys.prefix*) echo "$PREFIX" ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


PROMPTS = "requirements-prompts.txt"
EXTRAS = tuple(f"requirements-{name}.txt" for name in ("batch", "onnx", "serve", "training", "dev"))
REQUIREMENTS = ("requirements.txt", PROMPTS, *EXTRAS)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "a checkout"
    (root / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "setup_env.sh", root / "scripts")
    for name in (*REQUIREMENTS, "requirements-npu.txt"):
        (root / name).write_text(f"# {name}\n")
    (root / "apply_patch.sh").write_text('echo patched >>"$PREFIX/installed"; echo to-stdout\n')
    (root / "prefix").mkdir()
    (root / "python").write_text(PYTHON)
    (root / "python").chmod(0o755)
    return root


def set_up(root: Path, *arguments: str, **environment: str) -> tuple[int, str, str, list[str]]:
    """Exit code, stdout, stderr and the names of the files that were installed, without what NPU hosts need on top."""
    log = root / "prefix" / "installed"
    log.unlink(missing_ok=True)
    variables = os.environ | {"PYTHON": str(root / "python"), "PREFIX": str(root / "prefix")} | environment
    ended = subprocess.run(
        ["bash", root / "scripts" / "setup_env.sh", *arguments], env=variables, capture_output=True, text=True
    )
    installed = [Path(line).name for line in log.read_text().splitlines()] if log.exists() else []
    return ended.returncode, ended.stdout, ended.stderr, [name for name in installed if name != "requirements-npu.txt"]


def test_it_installs_once_and_prints_the_interpreter_alone(checkout: Path) -> None:
    code, out, _, installed = set_up(checkout, "--dev")
    assert (code, out) == (0, f"{checkout}/python\n")
    # DeepCache, among the tools, asks for a diffusers: ours has to be there first
    assert installed == ["requirements.txt", "patched", *REQUIREMENTS[1:]]
    assert set_up(checkout, "--dev")[3] == ["patched"]  # apply_patch.sh finds out by itself that it is up to date
    assert set_up(checkout)[3] == ["patched"]


def test_changed_requirements_are_installed_again(checkout: Path) -> None:
    set_up(checkout, "--dev")
    (checkout / "requirements-dev.txt").write_text("# other\n")
    assert set_up(checkout, "--dev")[3] == ["patched", "requirements-dev.txt"]


def test_a_failed_installation_is_tried_again(checkout: Path) -> None:
    (checkout / "prefix" / "offline").touch()
    code, out, err, installed = set_up(checkout)
    assert (code, out, installed) == (1, "", ["requirements.txt"])
    assert err.splitlines()[-1].startswith("setup_env.sh: could not install requirements.txt")
    (checkout / "prefix" / "offline").unlink()
    assert set_up(checkout)[3] == ["requirements.txt", "patched", PROMPTS]


def test_the_older_torch_is_installed_with_its_torch_npu_and_stays_until_another_is_chosen(checkout: Path) -> None:
    (checkout / "requirements.txt").write_text("numpy==2.4.6\ntorch==2.13.0\n")
    (checkout / "requirements-batch.txt").write_text("-r requirements.txt\ntorch_npu==2.13.0  # why\n")
    wanted, older = checkout / "prefix/wanted", "numpy==2.4.6\ntorch==2.10.0\n"
    code, _, err, installed = set_up(checkout, "--torch", "2.10.0")
    assert (code, installed) == (0, ["requirements.txt", "patched", PROMPTS]), err
    assert set_up(checkout)[3] == ["patched"]  # run_sd.sh says no version, and must not put the other one back
    set_up(checkout, "--batch")
    assert wanted.read_text() == "-r requirements.txt\ntorch_npu==2.10.0  # why\n"
    assert (checkout / "prefix/.diffusers-npu.requirements/requirements.txt").read_text() == older
    again = ["requirements.txt", "patched", PROMPTS, "requirements-batch.txt"]
    assert set_up(checkout, "--torch=2.13.0", "--batch")[3] == again
    assert wanted.read_text() == "-r requirements.txt\ntorch_npu==2.13.0  # why\n"
    assert set_up(checkout)[3] == ["patched"]


@pytest.mark.parametrize(
    ("arguments", "python", "message"),
    [
        (["--torch", "2.11.0"], "", "--torch 2.11.0: only 2.13.0 and 2.10.0 are tested"),
        (["--torch"], "", "--torch needs a version: 2.13.0 or 2.10.0"),
        (["--develop"], "", "unknown option '--develop'"),
        ([], "/no/such/python", "PYTHON=/no/such/python: there is no such program"),
        ([], "false", "does not run or is older than Python 3.11"),
    ],
)
def test_what_cannot_work_is_one_line(checkout: Path, arguments: list[str], python: str, message: str) -> None:
    code, out, err, installed = set_up(checkout, *arguments, **({"PYTHON": python} if python else {}))
    assert (code, out, installed) == (1, "", [])
    assert message in err and len(err.splitlines()) == 1
