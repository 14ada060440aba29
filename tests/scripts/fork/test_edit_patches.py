import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.fork.fork_wheel import cache_dir, read_pin
from tests.scripts.fork.sandbox import PATCHES, ROOT, SECOND, UPSTREAM, Sandbox, make_wheel, read_files, write_files

MESSAGE = "Subject\n\nWhat: a.\n\nWhy: b.\n\nUpstream: none\n\nTest: c\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wheel(tmp_path_factory.mktemp("wheel"), UPSTREAM)


@pytest.fixture
def sandbox(tmp_path: Path, wheel: Path) -> Sandbox:
    made = Sandbox(tmp_path, Path(sys.executable), wheel)
    made.set_up()
    return made


@pytest.fixture
def tree(sandbox: Sandbox) -> Path:
    folder = sandbox.folder / "a tree"
    result = sandbox.edit("open", folder, "--wheel", sandbox.wheel)
    assert result.returncode == 0, result.stderr
    save(sandbox, folder)  # from here on the patches read as git writes them, not as difflib does
    return folder


def git(tree: Path, *arguments: str, **environment: str) -> str:
    identity = ["-c", "user.name=me", "-c", "user.email=me@example.com", "-c", "core.editor=true"]
    command = ["git", *identity, *arguments]
    return subprocess.run(
        command, cwd=tree, env=os.environ | environment, check=True, capture_output=True, text=True
    ).stdout


def commit(tree: Path, files: dict[str, str], *arguments: str) -> None:
    write_files(tree, files)
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", *arguments)


def save(sandbox: Sandbox, tree: Path, **environment: str) -> set[str]:
    """Saves and returns the names of the files in patches/."""
    result = sandbox.edit("save", tree, **environment)
    assert result.returncode == 0, result.stderr
    return set(read_files(sandbox.patches)) - {"upstream.toml"}


def assert_refused(sandbox: Sandbox, *arguments: str | Path, says: tuple[str, ...]) -> None:
    before = read_files(sandbox.patches)
    result = sandbox.edit(*arguments)
    assert result.returncode == 1
    for part in says:
        assert part in result.stderr
    assert "Traceback" not in result.stderr
    assert read_files(sandbox.patches) == before


# --- open ---------------------------------------------------------------------------------------------------------


def test_the_tree_has_a_commit_per_patch_on_upstream(tree: Path) -> None:
    assert git(tree, "log", "--reverse", "--format=%s").splitlines() == [
        "diffusers 0.42.1",
        "Files that only the fork has (patches/new)",
        "Patch the first",
        "Patch the second",
        "Patch windows",
    ]
    assert git(tree, "status", "--porcelain") == ""
    assert tree.joinpath("diffusers/attention.py").read_text() == SECOND


def test_an_existing_folder_is_not_touched(sandbox: Sandbox, tree: Path) -> None:
    before = read_files(tree)
    assert_refused(sandbox, "open", tree, says=("exists already",))
    assert read_files(tree) == before


def test_a_patch_that_does_not_apply_leaves_no_half_tree(sandbox: Sandbox) -> None:
    sandbox.patches.joinpath("0001-patch-the-first.patch").unlink()
    folder = sandbox.folder / "tree"
    assert_refused(sandbox, "open", folder, "--wheel", sandbox.wheel, says=("0002-patch-the-second.patch", "hunk 1"))
    assert not folder.exists()


# --- save ---------------------------------------------------------------------------------------------------------


def test_open_and_save_without_edits_changes_nothing(sandbox: Sandbox, tree: Path) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sandbox.patches.rglob("*.*")}
    again = sandbox.folder / "again"
    assert sandbox.edit("open", again).returncode == 0
    save(sandbox, again)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sandbox.patches.rglob("*.*")} == before


def test_settings_of_the_user_do_not_change_the_patches(sandbox: Sandbox, tree: Path) -> None:
    before = read_files(sandbox.patches)
    for setting in ("diff.noprefix=true", "diff.context=9", "diff.algorithm=patience", "core.abbrev=5"):
        git(tree, "config", *setting.split("="))
    home = sandbox.folder / "home"
    write_files(
        home, {".gitconfig": "[core]\n attributesFile = ~/attributes\n autocrlf = true\n[diff]\n mnemonicPrefix\n"}
    )
    write_files(home, {"attributes": "*.py diff=python text\n", ".config/git/attributes": "*.py -diff\n"})
    more = {"GIT_DIFF_OPTS": "--unified=0", "GIT_CONFIG_PARAMETERS": "'color.ui'='always'"}
    save(sandbox, tree, XDG_CONFIG_HOME=str(home / ".config"), **more)
    assert read_files(sandbox.patches) == before


def test_an_edited_commit_changes_its_patch_alone(sandbox: Sandbox, tree: Path) -> None:
    before = read_files(sandbox.patches)
    text = tree.joinpath("diffusers/windows.py").read_bytes().decode()
    commit(tree, {"diffusers/windows.py": text.replace("'patched'", "'better'")}, "--fixup", ":/Patch windows")
    git(tree, "rebase", "--quiet", "--interactive", "--autosquash", "--root", GIT_SEQUENCE_EDITOR="true")
    save(sandbox, tree)
    after = read_files(sandbox.patches)
    assert {name for name in after if after[name] != before.get(name)} == {"0003-patch-windows.patch"}
    assert b"+second = 'better'\r\n" in after["0003-patch-windows.patch"]


def test_a_new_commit_becomes_a_patch_named_by_its_subject(sandbox: Sandbox, tree: Path) -> None:
    message = MESSAGE.replace("Subject", "Do something about `x.y`: a subject that is too long for the name of a file")
    commit(tree, {"diffusers/attention.py": SECOND + "more = 1\n"}, "-m", message)
    names = save(sandbox, tree)
    assert "0004-do-something-about-x.y-a-subject-that-is-too-long-for-the.patch" in names
    patch = sandbox.patches / "0004-do-something-about-x.y-a-subject-that-is-too-long-for-the.patch"
    assert patch.read_text().startswith(message + "\ndiff --git ")


def test_a_dropped_commit_takes_its_patch_along(sandbox: Sandbox, tree: Path) -> None:
    git(tree, "reset", "--quiet", "--hard", "HEAD~1")
    assert save(sandbox, tree) == set(PATCHES) - {"0003-patch-windows.patch"}


def test_files_that_upstream_lacks_are_saved_whole(sandbox: Sandbox, tree: Path) -> None:
    tree.joinpath("diffusers/npu/kernels.py").unlink()
    files = {"diffusers/npu/fresh file.py": "fresh = 1\n", "diffusers/attention.py": SECOND + "more = 1\n"}
    commit(tree, files, "-m", MESSAGE)
    names = save(sandbox, tree)
    assert {name for name in names if name.startswith("new/")} == {
        "new/diffusers/npu/__init__.py",
        "new/diffusers/npu/fresh file.py",
    }
    assert "fresh" not in sandbox.patches.joinpath("0004-subject.patch").read_text()


# --- what cannot be saved -----------------------------------------------------------------------------------------


def test_a_commit_without_a_header_is_refused(sandbox: Sandbox, tree: Path) -> None:
    commit(tree, {"diffusers/attention.py": SECOND + "more = 1\n"}, "-m", "Quick\n\nWhat: x\n\nWhy:\n")
    assert_refused(sandbox, "save", tree, says=("'Quick'", "Why:, Upstream:, Test:"))


def test_uncommitted_changes_are_refused(sandbox: Sandbox, tree: Path) -> None:
    write_files(tree, {"diffusers/forgotten.py": ""})
    assert_refused(sandbox, "save", tree, says=("in no commit", "diffusers/forgotten.py"))


def test_compiled_files_are_no_changes(sandbox: Sandbox, tree: Path) -> None:
    write_files(tree, {"diffusers/__pycache__/attention.pyc": ""})
    save(sandbox, tree)


def test_a_merge_is_refused(sandbox: Sandbox, tree: Path) -> None:
    git(tree, "checkout", "--quiet", "-b", "side", "HEAD~1")
    commit(tree, {"diffusers/attention.py": SECOND + "more = 1\n"}, "-m", MESSAGE)
    git(tree, "merge", "--quiet", "main")
    assert_refused(sandbox, "save", tree, says=("line of commits",))


def test_a_tree_on_another_upstream_is_refused(sandbox: Sandbox, tree: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_files(other, UPSTREAM | {"diffusers/callbacks.py": "other = True\n"})
    git(other, "init", "--quiet")
    git(other, "config", "core.autocrlf", "false")
    commit(other, {}, "-m", "another upstream")
    assert_refused(sandbox, "save", other, says=("is not what", "diffusers/callbacks.py"))


def test_a_folder_that_is_no_tree_is_refused(sandbox: Sandbox, tmp_path: Path) -> None:
    assert_refused(sandbox, "save", tmp_path, says=("no git tree", "edit_patches.sh open"))


def test_wrong_usage_is_one_line_and_exit_code_2(sandbox: Sandbox) -> None:
    for arguments in ([], ["open"], ["close", "x"], ["save", "x", "--force"]):
        result = sandbox.edit(*arguments)
        assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)


# --- the patches of this repository -------------------------------------------------------------------------------


def test_the_patches_of_this_repository_survive_the_round_trip(sandbox: Sandbox) -> None:
    pin = read_pin()
    upstream = cache_dir() / pin.wheel_name
    if not upstream.exists():
        pytest.skip(f"{upstream} is not here; apply_patch.sh fetches it")
    for path in sandbox.patches.glob("*.patch"):
        path.unlink()
    files = {name: content.decode() for name, content in read_files(ROOT / "patches").items()}
    write_files(sandbox.patches, files)
    sandbox.patches.joinpath("new/diffusers/npu/__init__.py").unlink()
    sandbox.patches.joinpath("new/diffusers/npu/kernels.py").unlink()
    before = read_files(sandbox.patches)
    tree = sandbox.folder / "tree"
    assert sandbox.edit("open", tree, "--wheel", upstream).returncode == 0
    save(sandbox, tree)
    assert read_files(sandbox.patches) == before
