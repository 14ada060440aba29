"""The command line of atc: what CANN's manual wants of it, said before atc reads a model; what a failure leaves."""

import os
import shlex
import stat
from pathlib import Path
from typing import Any

import pytest

from ascend.atc import AtcCall, AtcError, check_soc_version, run_atc

IMAGES = {"pixel_values": (-1, 3, 224, 224)}


def call(**changes: Any) -> AtcCall:
    given = {"model": Path("in.onnx"), "output": Path("out.om"), "soc_version": "Ascend310P3"}
    return AtcCall(**{**given, **changes})


@pytest.mark.parametrize("name", ["Ascend310P", "Ascend910", "Ascend910B", "910B", "Ascend310B"])
def test_a_family_is_no_chip(name: str) -> None:
    with pytest.raises(AtcError, match=f"'{name}' is a family of chips.*npu-smi info"):
        check_soc_version(name)


@pytest.mark.parametrize(
    "name, spelt",
    [
        ("Ascend310p3", "Ascend310P3"),
        ("310p3", "Ascend310P3"),
        ("ascend910b3", "Ascend910B3"),
        ("ASCEND910PROA", "Ascend910ProA"),
    ],
)
def test_a_chip_in_other_letters_is_told_its_own(name: str, spelt: str) -> None:
    with pytest.raises(AtcError, match=f"'{name}' is spelt {spelt}"):
        check_soc_version(name)
    with pytest.raises(AtcError, match="'ascend310p' is a family"):
        check_soc_version("ascend310p")


def test_names_of_chips() -> None:
    assert check_soc_version("310P3") == check_soc_version("Ascend310P3") == "Ascend310P3"
    assert check_soc_version("Ascend910_9391") == "Ascend910_9391"
    for name in ("", "H200", "Ascend", "Ascend910B3; rm"):
        with pytest.raises(AtcError, match="no chip's name"):
            check_soc_version(name)


def test_fixed_shapes() -> None:
    command = call(input_shapes={"ids": (2, 77), "mask": (2, 77)}, others={"op_select_implmode": "high_precision"})
    assert command.command() == [
        "atc",
        "--model=in.onnx",
        "--framework=5",
        "--output=out",
        "--soc_version=Ascend310P3",
        "--log=error",
        "--input_shape=ids:2,77;mask:2,77",
        "--input_format=ND",
        "--op_select_implmode=high_precision",
    ]


def test_profiles_of_batches_and_aipp() -> None:
    command = call(input_shapes=IMAGES, dynamic_batch_sizes=(1, 2, 4), insert_op_conf=Path("aipp.cfg")).command()
    assert {"--input_format=NCHW", "--dynamic_batch_size=1,2,4", "--insert_op_conf=aipp.cfg"} <= set(command)
    assert "--input_shape=pixel_values:-1,3,224,224" in command


def test_a_profile_has_a_value_for_every_open_dimension() -> None:
    shapes = {"input_ids": (-1, 77), "pixel_values": (-1, 3, 224, 224), "attention_mask": (-1, 77)}
    with pytest.raises(AtcError, match=r"the profile 1 of dynamic_dims has 1 values.*3 times -1.*as 1,1,1"):
        call(input_shapes=shapes, dynamic_dims=[[1], [2], [4], [8]]).command()
    command = call(input_shapes=shapes, dynamic_dims=[[n] * 3 for n in (1, 2, 4, 8)]).command()
    assert {"--input_format=ND", "--dynamic_dims=1,1,1;2,2,2;4,4,4;8,8,8"} <= set(command)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dynamic_batch_sizes": (1, 2), "dynamic_dims": [[1], [2]]}, "exclude each other"),
        ({"dynamic_dims": [[1], [2]], "insert_op_conf": Path("a")}, "dynamic_dims and AIPP exclude each other"),
        ({"dynamic_batch_sizes": (1,)}, "1 profiles, and atc takes 2 to 100"),
        ({"dynamic_batch_sizes": (1, 2), "input_shapes": {"x": (1, 3)}}, "no input has one"),
        ({"dynamic_batch_sizes": (1, 2), "input_shapes": {"x": (-1, -1)}}, "first dimension alone"),
        ({"dynamic_dims": [[1], [2]], "input_shapes": {}}, "needs the shapes"),
        ({}, "no profile says what it stands for: give dynamic_dims; models of unlimited shapes"),
        ({"soc_version": "Ascend910B"}, "family"),
    ],
)
def test_what_atc_would_refuse(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AtcError, match=message):
        call(**{"input_shapes": IMAGES, **changes}).command()


@pytest.mark.parametrize(
    "name", ["my models/a.onnx", "a,b.onnx", "a;b.onnx", "modèles/a.onnx", "~/a.onnx", "a\\b.onnx"]
)
@pytest.mark.parametrize("field", ["model", "output", "insert_op_conf"])
def test_paths_that_atc_does_not_take(field: str, name: str) -> None:
    with pytest.raises(AtcError, match="atc does not take the path '.*, which has '[ ,;è~\\\\]'"):
        call(**{field: Path(name)}).command()


def test_paths_are_read_where_links_lead_to(tmp_path: Path) -> None:
    (tmp_path / "my models").mkdir()
    (tmp_path / "link").symlink_to("my models")
    with pytest.raises(AtcError, match="my models/in.onnx', which has ' '"):
        call(model=tmp_path / "link/in.onnx").command()
    call(output=tmp_path / "link/out.om", model=Path("模型/a-b_c.1.onnx")).command()


@pytest.mark.parametrize(
    "name", ["model", "framework", "output", "soc_version", "log", "input_shape", "input_format", "precision_mode"]
)
def test_further_options_do_not_overrule_ours(name: str) -> None:
    with pytest.raises(AtcError, match=f"^{name}: no further option"):
        call(input_shapes={"x": (1, 3)}, others={name: "x", "op_select_implmode": "high_precision"}).command()


def test_profiles_of_pictures_are_a_further_option() -> None:
    command = call(input_shapes={"image": (1, 3, -1, -1)}, others={"dynamic_image_size": "8,8;16,16"}).command()
    assert {"--input_format=NCHW", "--dynamic_image_size=8,8;16,16"} <= set(command)


def program(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a shell script in atc's place on PATH."""
    path = folder / "bin/atc"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")


FIND_OUTPUT = 'for each in "$@"; do case $each in --output=*) out=${each#--output=};; esac; done\n'


@pytest.mark.parametrize("ending", [".om", "_linux_$(uname -m).om"])
def test_the_model_is_where_it_was_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    program(tmp_path, FIND_OUTPUT + f'echo "ATC run success"; echo model > "$out"{ending}', monkeypatch)
    made = run_atc(call(output=tmp_path / "tower.om"), tmp_path / "log")
    assert made == tmp_path / "tower.om" and made.read_text() == "model\n"
    assert "ATC run success" in (tmp_path / "log").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "tower.om", "log"}


def test_a_failure_says_what_atc_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = 'echo half > "$out".om; echo "E10054: on stdout"; echo "on stderr" >&2; exit 3'
    program(tmp_path, FIND_OUTPUT + script, monkeypatch)
    with pytest.raises(AtcError, match=r"(?s)exit code 3.*E10054: on stdout\non stderr"):
        run_atc(call(output=tmp_path / "tower.om"), tmp_path / "log")
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "log"}


def test_the_log_has_a_command_that_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, FIND_OUTPUT + 'echo model > "$out".om', monkeypatch)
    one = call(output=tmp_path / "tower.om", input_shapes={"a": (1, 3), "b c": (1, 3)})
    run_atc(one, tmp_path / "log")
    said = shlex.split((tmp_path / "log").read_text().splitlines()[0])
    assert "--input_shape=a:1,3;b c:1,3" in said and said[0] == str(tmp_path / "bin/atc")


def test_a_signal_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "kill -9 $$", monkeypatch)
    with pytest.raises(AtcError, match="was ended by SIGKILL"):
        run_atc(call(output=tmp_path / "tower.om"), tmp_path / "log")


def test_success_without_a_file_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "exit 0", monkeypatch)
    with pytest.raises(AtcError, match="left no .om"):
        run_atc(call(output=tmp_path / "tower.om"), tmp_path / "log")


def test_without_atc_the_error_says_where_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AtcError, match="not on PATH.*set_env.sh"):
        run_atc(call(), tmp_path / "log")
