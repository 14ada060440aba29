"""A directory that looks like an installed CANN toolkit to torch_npu's checks. It holds nothing of CANN."""

from pathlib import Path

from emulator.profile import CANN_VERSION


def write(root: Path) -> None:
    for name in ("runtime", "compiler", "opp", "lib64"):  # _cann_package_check wants the first three
        (root / name).mkdir(parents=True)
    # torch_npu.utils.collect_env looks for 'version' in a file of this name pattern.
    (root / "ascend_toolkit_install.info").write_text(f"package_name=CANN-emulator\nversion={CANN_VERSION}\n")


def environment(root: Path) -> dict[str, str]:
    return {"ASCEND_HOME_PATH": str(root), "ASCEND_OPP_PATH": str(root / "opp")}
