import base64
import contextlib
import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import psutil
import pytest

from scripts.fork.fork_wheel import cache_dir, read_pin
from tests.scripts.fork.sandbox import (
    BODY,
    PATCHES,
    ROOT,
    SECOND,
    UPSTREAM,
    Sandbox,
    edited,
    make_environment,
    make_wheel,
    patch_text,
    read_files,
    write_files,
)

NOT_INSTALLED, UPSTREAM_INSTALLED, OUT_OF_DATE, OTHER = 3, 4, 5, 6


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_environment(tmp_path_factory.mktemp("environment"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wheel(tmp_path_factory.mktemp("wheel"), UPSTREAM)


@pytest.fixture
def sandbox(tmp_path: Path, python: Path, wheel: Path) -> Sandbox:
    made = Sandbox(tmp_path, python, wheel)
    made.set_up()
    made.uninstall()
    return made


@pytest.fixture
def patched(sandbox: Sandbox) -> Sandbox:
    result = sandbox.apply("--wheel", sandbox.wheel)
    assert result.returncode == 0, result.stderr
    return sandbox


def build(sandbox: Sandbox, folder: Path, **environment: str) -> Path:
    result = sandbox.apply("--wheel", sandbox.wheel, "--build-only", folder, **environment)
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.strip())


def add_patch(sandbox: Sandbox, name: str, before: str, after: str) -> None:
    path = "diffusers/attention.py"
    sandbox.patches.joinpath(name).write_text(patch_text("Another", path, before, after))


def assert_refused(sandbox: Sandbox, *arguments: str | Path, says: tuple[str, ...], **environment: str) -> None:
    before = installed(sandbox)
    result = sandbox.apply(*arguments, **environment)
    assert result.returncode == 1, result.stdout
    for part in says:
        assert part in result.stderr
    assert "Traceback" not in result.stderr
    assert installed(sandbox) == before


def installed(sandbox: Sandbox) -> dict[str, dict[str, bytes]]:
    return {path.name: read_files(path) for path in sandbox.site_packages.glob("diffusers*")}


# --- what is installed --------------------------------------------------------------------------------------------


def test_the_installed_fork_is_upstream_with_the_patches_and_the_new_files(patched: Sandbox) -> None:
    package = patched.site_packages / "diffusers"
    assert patched.version() == "0.42.1+npu.1"
    assert package.joinpath("attention.py").read_text() == SECOND
    assert package.joinpath("windows.py").read_bytes() == b"first = 1\r\nsecond = 'patched'\r\nthird = 3"
    assert package.joinpath("npu/kernels.py").read_text() == PATCHES["new/diffusers/npu/kernels.py"]


def test_metadata_and_record_of_the_wheel_belong_to_the_fork(sandbox: Sandbox, tmp_path: Path) -> None:
    wheel = build(sandbox, tmp_path)
    assert wheel.name == "diffusers-0.42.1+npu.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        info = "diffusers-0.42.1+npu.1.dist-info"
        assert "Version: 0.42.1+npu.1\n" in archive.read(f"{info}/METADATA").decode()
        rows = list(csv.reader(archive.read(f"{info}/RECORD").decode().splitlines()))
        assert {row[0] for row in rows} == set(archive.namelist())
        for name, digest, size in rows[:-1]:
            content = archive.read(name)
            expected = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            assert (digest, int(size)) == (f"sha256={expected}", len(content))


def test_the_same_sources_give_the_same_bytes(sandbox: Sandbox, tmp_path: Path) -> None:
    first = build(sandbox, tmp_path / "one").read_bytes()
    time.sleep(2)  # the clock of a zip file ticks every two seconds
    other_temporary = tmp_path / "temporary"
    other_temporary.mkdir()
    old = os.umask(0o077)
    try:
        again = build(sandbox, tmp_path / "two", TMPDIR=str(other_temporary), SOURCE_DATE_EPOCH="1700000000")
    finally:
        os.umask(old)
    assert again.read_bytes() == first


def test_build_only_leaves_the_environment_alone(sandbox: Sandbox, tmp_path: Path) -> None:
    build(sandbox, tmp_path / "dist")
    assert sandbox.version() == ""
    assert [path.name for path in tmp_path.joinpath("dist").iterdir()] == ["diffusers-0.42.1+npu.1-py3-none-any.whl"]


# --- states -------------------------------------------------------------------------------------------------------


def test_check_tells_the_states_apart(sandbox: Sandbox, tmp_path: Path) -> None:
    seen = [sandbox.apply("--check")]
    sandbox.install(sandbox.wheel)
    seen.append(sandbox.apply("--check"))
    sandbox.apply("--wheel", sandbox.wheel)
    seen.append(sandbox.apply("--check"))
    add_patch(sandbox, "0004-another.patch", SECOND, SECOND + "fourth = 'patched'\n")
    seen.append(sandbox.apply("--check"))
    sandbox.install(make_wheel(tmp_path / "other", renamed(UPSTREAM, "0.30.0")))
    seen.append(sandbox.apply("--check"))
    assert [result.returncode for result in seen] == [NOT_INSTALLED, UPSTREAM_INSTALLED, 0, OUT_OF_DATE, OTHER]
    words = ["not installed", "upstream", "up to date", "out of date", "other version"]
    assert all(word in result.stdout for word, result in zip(words, seen, strict=True))
    assert all(str(sandbox.python) in result.stdout for result in seen)


def renamed(files: dict[str, str], version: str) -> dict[str, str]:
    return {name.replace("0.42.1", version): text.replace("0.42.1", version) for name, text in files.items()}


def test_a_second_run_does_nothing_and_needs_nothing(patched: Sandbox) -> None:
    shutil.rmtree(patched.folder / "cache")
    before = {path: path.stat().st_mtime_ns for path in patched.site_packages.rglob("*")}
    result = patched.apply(PATH=path_without(patched, "git"))
    assert (result.returncode, "Nothing to do" in result.stdout) == (0, True)
    assert {path: path.stat().st_mtime_ns for path in patched.site_packages.rglob("*")} == before


def path_without(sandbox: Sandbox, missing: str) -> str:
    """A PATH with the tools that the launcher needs, but not `missing`."""
    folder = sandbox.folder / "bin"
    folder.mkdir(exist_ok=True)
    for name in {"bash", "dirname", "readlink", "git"} - {missing}:
        folder.joinpath(name).symlink_to(str(shutil.which(name)))
    return str(folder)


def test_changed_patches_are_installed_again(patched: Sandbox) -> None:
    add_patch(patched, "0004-another.patch", SECOND, SECOND + "fourth = 'patched'\n")
    result = patched.apply()
    assert result.returncode == 0, result.stderr
    assert "fourth" in patched.site_packages.joinpath("diffusers/attention.py").read_text()
    assert patched.apply("--check").returncode == 0


def test_revert_puts_upstream_back_from_the_cache(patched: Sandbox, tmp_path: Path) -> None:
    result = patched.apply("--revert")
    assert result.returncode == 0, result.stderr
    assert installed(patched)["diffusers"] == {
        name.removeprefix("diffusers/"): text.encode()
        for name, text in UPSTREAM.items()
        if name.startswith("diffusers/")
    }
    assert set(installed(patched)) == {"diffusers", "diffusers-0.42.1.dist-info"}
    assert "Nothing to revert" in patched.apply("--revert").stdout


@pytest.mark.parametrize("version", ["0.30.0", "0.42.1+other"])
def test_a_foreign_version_is_left_alone(sandbox: Sandbox, tmp_path: Path, version: str) -> None:
    sandbox.install(make_wheel(tmp_path / "other", renamed(UPSTREAM, version)))
    assert_refused(sandbox, says=(f"diffusers {version}", "other version", "pip install diffusers==0.42.1"))
    assert_refused(sandbox, "--revert", says=(version,))


def test_a_checkout_installed_as_the_same_version_is_left_alone(sandbox: Sandbox) -> None:
    sandbox.install(sandbox.wheel)
    origin = {"url": "file:///home/me/diffusers", "dir_info": {"editable": True}}
    info = sandbox.site_packages / "diffusers-0.42.1.dist-info"
    info.joinpath("direct_url.json").write_text(json.dumps(origin))
    assert_refused(sandbox, says=("other version",))


def test_a_diffusers_on_pythonpath_is_not_the_installed_one(patched: Sandbox, tmp_path: Path) -> None:
    write_files(tmp_path / "shadow", UPSTREAM)
    assert patched.apply("--check", PYTHONPATH=str(tmp_path / "shadow")).returncode == 0


# --- patches that do not apply ------------------------------------------------------------------------------------


def test_a_patch_that_does_not_apply_is_named_with_file_and_hunk(patched: Sandbox) -> None:
    foreign = SECOND.replace("line_40 = 40", "line_40 = 'unlike upstream'")
    wanted = "".join(edited(edited(foreign.splitlines(keepends=True), 20, "good = 1"), 41, "bad = 1"))
    add_patch(patched, "0004-stale.patch", foreign, wanted)
    assert_refused(patched, says=("0004-stale.patch", "diffusers/attention.py: hunk 2 does not match"))


def test_a_hunk_that_fits_only_at_another_line_is_refused(patched: Sandbox) -> None:
    shifted = "one_more_line = True\n" + SECOND
    add_patch(patched, "0004-shifted.patch", shifted, shifted.replace("line_30 = 30", "moved = 30"))
    assert_refused(patched, says=("0004-shifted.patch", "diffusers/attention.py: hunk 1 matches only at line"))


def test_context_that_differs_in_white_space_is_refused(patched: Sandbox) -> None:
    spaced = SECOND.replace("line_31 = 31", "line_31 =  31")
    add_patch(patched, "0004-spaced.patch", spaced, spaced.replace("line_30 = 30", "moved = 30"))
    assert_refused(
        patched, says=("0004-spaced.patch", "hunk 1"), GIT_CONFIG_COUNT="1", **git_setting("apply.ignoreWhitespace")
    )


def git_setting(name: str, value: str = "change") -> dict[str, str]:
    return {"GIT_CONFIG_KEY_0": name, "GIT_CONFIG_VALUE_0": value}


def test_a_patch_of_a_file_that_upstream_lacks_is_refused(patched: Sandbox) -> None:
    text = patch_text("Lost", "diffusers/gone.py", "".join(BODY), SECOND)
    patched.patches.joinpath("0004-lost.patch").write_text(text)
    assert_refused(patched, says=("0004-lost.patch", "diffusers/gone.py"))


def test_a_new_file_that_upstream_has_is_refused(patched: Sandbox) -> None:
    write_files(patched.patches, {"new/diffusers/attention.py": "ours = True\n"})
    assert_refused(patched, says=("attention.py exists upstream",))


def test_a_repository_around_the_build_does_not_hide_files_from_the_patches(sandbox: Sandbox, tmp_path: Path) -> None:
    around = tmp_path / "around"
    write_files(around, {".gitignore": "*\n"})
    subprocess.run(["git", "init", "--quiet", around], check=True)
    built = build(
        sandbox, tmp_path / "dist", TMPDIR=str(around), GIT_DIR=str(around / ".git"), GIT_WORK_TREE=str(around)
    )
    with zipfile.ZipFile(built) as archive:
        assert archive.read("diffusers/attention.py").decode() == SECOND


# --- the upstream wheel -------------------------------------------------------------------------------------------


def test_a_wheel_with_another_hash_is_refused(patched: Sandbox, tmp_path: Path) -> None:
    add_patch(patched, "0004-another.patch", SECOND, SECOND + "fourth = 'patched'\n")
    other = tmp_path / "tampered.whl"
    other.write_bytes(patched.wheel.read_bytes() + b"\0")
    found = hashlib.sha256(other.read_bytes()).hexdigest()
    assert_refused(patched, "--wheel", other, says=("tampered.whl", found, "upstream.toml"))


def test_a_damaged_cache_is_not_used(sandbox: Sandbox, tmp_path: Path) -> None:
    build(sandbox, tmp_path)
    [cached] = sandbox.folder.glob("cache/diffusers-npu/*.whl")
    cached.write_bytes(b"damaged")
    assert_refused(sandbox, says=("pip download failed",))
    result = sandbox.apply(PIP_FIND_LINKS=str(sandbox.wheel.parent))
    assert result.returncode == 0, result.stderr
    assert cached.read_bytes() == sandbox.wheel.read_bytes()


def test_without_network_the_advice_is_to_pass_the_wheel(sandbox: Sandbox, tmp_path: Path) -> None:
    assert_refused(sandbox, says=("pip download failed", "--wheel FILE"))
    assert_refused(sandbox, "--wheel", tmp_path / "absent.whl", says=("absent.whl: there is no such file",))


# --- the environment ----------------------------------------------------------------------------------------------


def test_when_pip_fails_halfway_the_old_version_remains(sandbox: Sandbox) -> None:
    sandbox.install(sandbox.wheel)
    write_files(sandbox.site_packages, {"diffusers/npu/kernels.py/keep": ""})  # a folder where the fork has a file
    assert_refused(sandbox, "--wheel", sandbox.wheel, says=("pip install failed",))
    assert sandbox.apply("--check").returncode == UPSTREAM_INSTALLED
    assert sandbox.version() == "0.42.1"


def test_an_interrupt_while_pip_works_does_not_tear_the_package(sandbox: Sandbox) -> None:
    sandbox.install(sandbox.wheel)
    command = ["bash", str(sandbox.repo / "apply_patch.sh"), "--wheel", str(sandbox.wheel)]
    run = subprocess.Popen(command, env=sandbox.environment, stdout=subprocess.PIPE, start_new_session=True)
    interrupts = 0
    while run.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            if any("install" in child.cmdline() for child in psutil.Process(run.pid).children()):
                os.killpg(run.pid, signal.SIGINT)
                interrupts += 1
        time.sleep(0.05)
    assert interrupts > 0
    assert sandbox.version() == "0.42.1+npu.1"
    assert sandbox.apply("--check").returncode == 0


def test_a_wheel_that_pip_put_elsewhere_is_not_called_installed(sandbox: Sandbox, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    assert_refused(sandbox, "--wheel", sandbox.wheel, says=("does not see it",), PIP_TARGET=str(elsewhere))


def test_two_runs_at_once_both_succeed(sandbox: Sandbox) -> None:
    command = ["bash", str(sandbox.repo / "apply_patch.sh"), "--wheel", str(sandbox.wheel)]
    runs = [subprocess.Popen(command, env=sandbox.environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(run.communicate()[0].splitlines()[1] for run in runs)
    assert [run.returncode for run in runs] == [0, 0]
    assert said[0].startswith("Installed") and said[1].endswith("Nothing to do.")
    assert sandbox.version() == "0.42.1+npu.1"


@pytest.mark.parametrize("module", ["pip", "wheel"])
def test_a_missing_module_is_named(sandbox: Sandbox, module: str) -> None:
    package = sandbox.site_packages / module
    hidden = package.rename(package.with_name("hidden"))
    try:
        assert_refused(sandbox, "--wheel", sandbox.wheel, says=(f"lacks {module}", f"{sandbox.python} -m"))
    finally:
        hidden.rename(package)


def test_missing_programs_are_named(sandbox: Sandbox) -> None:
    assert_refused(
        sandbox, "--wheel", sandbox.wheel, says=("git is not installed",), PATH=path_without(sandbox, "git")
    )
    assert_refused(sandbox, says=("'no-such-python'", "PYTHON="), PYTHON="no-such-python")


@pytest.mark.parametrize("arguments", [["--no-such"], ["extra"], ["--check", "--revert"], ["--check", "--wheel", "x"]])
def test_wrong_usage_is_one_line_and_exit_code_2(sandbox: Sandbox, arguments: list[str]) -> None:
    result = sandbox.apply(*arguments)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "--help" in result.stderr


# --- the patches of this repository -------------------------------------------------------------------------------


def test_every_patch_says_what_why_upstream_and_test() -> None:
    for patch in ROOT.joinpath("patches").glob("*.patch"):
        header = patch.read_text("utf-8").split("\ndiff --git ")[0]
        for field in ("What:", "Why:", "Upstream:", "Test:"):
            assert f"\n{field} " in header, f"{patch.name} lacks {field}"
        for word in header.split("\nTest: ")[1].split():
            if word.startswith("tests/"):
                assert ROOT.joinpath(word.split("::")[0].rstrip(",.;")).exists(), (
                    f"{patch.name}: {word} does not exist"
                )


def test_the_real_wheel_differs_from_upstream_only_where_the_patches_say(tmp_path: Path) -> None:
    pin = read_pin()
    upstream = cache_dir() / pin.wheel_name
    if not upstream.exists():
        pytest.skip(f"{upstream} is not here; apply_patch.sh fetches it")
    command = ["bash", str(ROOT / "apply_patch.sh"), "--build-only"]
    built = []
    for name in ("one", "two"):
        run = subprocess.run(
            [*command, str(tmp_path / name)],
            env=os.environ | {"PYTHON": sys.executable},
            check=True,
            capture_output=True,
        )
        built.append(Path(run.stdout.decode().strip()))
    assert built[0].read_bytes() == built[1].read_bytes()

    def contents(wheel: Path) -> dict[str, bytes]:
        with zipfile.ZipFile(wheel) as archive:
            return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}

    before, after = contents(upstream), contents(built[0])
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    patches = ROOT / "patches"
    named = {"diffusers/__init__.py"} | {
        line.removeprefix("+++ b/")
        for patch in patches.glob("*.patch")
        for line in patch.read_text("utf-8").splitlines()
        if line.startswith("+++ b/")
    }
    added = {path.relative_to(patches / "new").as_posix() for path in patches.glob("new/**/*.py")}
    assert changed == named | added
