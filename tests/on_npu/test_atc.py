"""The emulated atc takes and refuses what the documented one does: each rule with where it is written.

CLI and E are `docs/zh/user_guides/atc_tools/CLI_options` and `docs/zh/user_guides/error_codes` of hicann/ge,
`main_impl` is `api/atc/main_impl.cc`, `option_utils` is `compiler/api/aclgrph/option_utils.cc` there.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.on_npu import offline_models

if "CANN_EMULATOR_SOC" not in os.environ:
    pytest.skip("these are the emulator's own", allow_module_level=True)

SOC = offline_models.SOC
HAS_BFLOAT16 = SOC == "Ascend910B3"


class Atc:
    """Runs atc's code in this process, which saves the start of one; `test_the_command` runs the command."""

    def __init__(self, capture: pytest.CaptureFixture[str], directory: Path) -> None:
        self._capture, self.directory = capture, directory
        self._main = ctypes.CDLL("libcann_emulator.so").cann_emulator_atc

    def __call__(self, *options: str) -> tuple[int, str]:
        arguments = [b"atc", *(os.fsencode(option) for option in options)]
        self._capture.readouterr()
        code = self._main(len(arguments), (ctypes.c_char_p * len(arguments))(*arguments))
        return code, self._capture.readouterr().out

    def convert(self, **options: str | None) -> tuple[int, str]:
        """Converts `model`; options of None are left out."""
        values: dict[str, str | None] = {"framework": "5", "output": str(self.directory / "out"), "soc_version": SOC}
        values |= options
        return self(*(f"--{name}={value}" for name, value in values.items() if value is not None))


@pytest.fixture
def atc(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Atc:
    return Atc(capfd, tmp_path)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("models")
    return {
        "open": str(offline_models.save_linear(directory / "open.onnx")),
        "fixed": str(offline_models.save_linear(directory / "fixed.onnx", batch=2)),
        "new": str(offline_models.save_linear(directory / "new.onnx", batch=2, opset=19)),
        "two": str(offline_models.save_two_inputs(directory / "two.onnx")),
        "image": str(offline_models.save_image(directory / "image.onnx")),
    }


BATCH = {"input_shape": "x:-1,16"}
TWO = {"input_shape": "ids:-1,-1;shift:-1,1,8", "input_format": "ND"}
IMAGE = {"input_shape": "image:1,3,-1,-1"}
MANY = ",".join(str(size) for size in range(1, 102))

# rule, model, options, code; None: it is taken
RULES: list[tuple[str, str, dict[str, str | None], str | None]] = [
    ("1 E10054: --soc_version is required", "fixed", {"soc_version": None}, "E10054"),
    ("1 E10054: --soc_version may not be empty", "fixed", {"soc_version": ""}, "E10054"),
    ("1 E10054: --output is required", "fixed", {"output": None}, "E10054"),
    ("1 E10054: --model is required", "", {}, "E10054"),
    ("1 E10007: --framework is required", "fixed", {"framework": None}, "E10007"),
    ("1 E10008: Caffe needs --weight", "fixed", {"framework": "0"}, "E10008"),
    ("1 main_impl: another framework", "fixed", {"framework": "7"}, "E10001"),
    ("2 E16002: an opset without parsers", "new", {}, "E16002"),
    ("3 E10022: a path without a file name", "fixed", {"output": "/tmp/"}, "E10022"),
    ("3 CLI --output: characters of paths", "fixed", {"output": "/tmp/a b"}, "E10001"),
    ("3 base/common/util.cc: Chinese alone beyond ASCII", "fixed", {"output": "/tmp/modèle"}, "E10001"),
    ("3 option_utils: a model that is not there", "missing", {}, "E10001"),
    ("5 E10002: a name and sizes", "fixed", {"input_shape": "2,16"}, "E10002"),
    ("5 E10002: no float", "fixed", {"input_shape": "x:2.0,16"}, "E10002"),
    ("5 E10002: digits only", "fixed", {"input_shape": "x:two,16"}, "E10002"),
    ("5 E10013: a number that does not fit", "fixed", {"input_shape": "x:99999999999999999999,16"}, "E10013"),
    ("5 E10016: no such node", "fixed", {"input_shape": "z:2,16"}, "E10016"),
    ("5 E10049: another rank", "fixed", {"input_shape": "x:2,16,1"}, "E10049"),
    ("5 CLI --input_shape: optional where the model is fixed", "fixed", {}, None),
    ("5 omg.cc: required where it is not", "open", {}, "E10001"),
    ("5 CLI --input_shape: fixes an open model", "open", {"input_shape": "x:4,16"}, None),
    (
        "7 E10009: two kinds of profiles",
        "open",
        {**BATCH, "dynamic_batch_size": "1,2", "dynamic_dims": "1;2"},
        "E10009",
    ),
    ("7 E10009: with a range", "open", {"dynamic_batch_size": "1,2", "input_shape_range": "x:[1~2,16]"}, "E10009"),
    ("7 E10004: profiles need --input_shape", "open", {"dynamic_batch_size": "1,2"}, "E10004"),
    ("8 E10018: only the first dimension", "two", {**TWO, "dynamic_batch_size": "1,2"}, "E10018"),
    ("8 E10031: no input has it", "open", {"input_shape": "x:2,16", "dynamic_batch_size": "1,2"}, "E10031"),
    ("8 E10003: digits and commas", "open", {**BATCH, "dynamic_batch_size": "1;2"}, "E10003"),
    ("8 CLI --dynamic_batch_size", "open", {**BATCH, "dynamic_batch_size": "1,2,4"}, None),
    ("9 E10003: a value for each -1", "two", {**TWO, "dynamic_dims": "1;2"}, "E10003"),
    ("9 option_utils: whole numbers", "two", {**TWO, "dynamic_dims": "1,a,1;2,4,2"}, "E10001"),
    ("9 E10038: positive", "two", {**TWO, "dynamic_dims": "0,2,1;2,4,2"}, "E10038"),
    ("9 option_utils: nothing is open", "fixed", {"input_shape": "x:2,16", "dynamic_dims": "1;2"}, "E10001"),
    ("9 CLI --dynamic_dims", "two", {**TWO, "dynamic_dims": "1,2,1;2,4,2"}, None),
    ("10 E10035: one profile", "open", {**BATCH, "dynamic_batch_size": "2"}, "E10035"),
    ("10 E10036: 101 profiles", "open", {**BATCH, "dynamic_batch_size": MANY}, "E10036"),
    ("10 E10039: the same twice", "open", {**BATCH, "dynamic_batch_size": "2,2"}, "E10039"),
    ("10 E10040: ranges beside them", "open", {"input_shape": "x:1~2,16", "dynamic_batch_size": "1,2"}, "E10040"),
    ("10 E10019: only height and width", "open", {**BATCH, "dynamic_image_size": "8,8;16,16"}, "E10019"),
    ("10 E10020: height and width", "image", {**IMAGE, "dynamic_image_size": "8,8,8;16,16,8"}, "E10020"),
    ("10 CLI --dynamic_image_size", "image", {**IMAGE, "dynamic_image_size": "8,8;16,16"}, None),
    ("12 main_impl: no format for ONNX", "fixed", {"input_format": "NHWC"}, "E10001"),
    ("12 main_impl: ND", "fixed", {"input_format": "ND"}, None),
    ("14 E10056: both precisions", "fixed", {"precision_mode": "force_fp16", "precision_mode_v2": "fp16"}, "E10056"),
    ("14 E10001: no such mode", "fixed", {"precision_mode": "fp16"}, "E10001"),
    ("14 E10001: no such mode of v2", "fixed", {"precision_mode_v2": "force_fp16"}, "E10001"),
    ("14 CLI --precision_mode_v2: hif8 is the 950's", "fixed", {"precision_mode_v2": "mixed_hif8"}, "E10001"),
    (
        "14 CLI --precision_mode: bfloat16 is not on 310P",
        "fixed",
        {"precision_mode": "allow_mix_precision_bf16"},
        None if HAS_BFLOAT16 else "E10001",
    ),
    ("14 CLI --output_type: needs --out_nodes", "fixed", {"output_type": "relu_node:0:FP16"}, "E10001"),
    ("14 CLI --output_type: no such type", "fixed", {"output_type": "FP8"}, "E10001"),
    ("14 E10016: --out_nodes", "fixed", {"out_nodes": "nothing:0"}, "E10016"),
    ("15 CLI --soc_version: no name of npu-smi", "fixed", {"soc_version": "Ascend910B"}, "E10001"),
    ("16 ModelZoo: int64 inputs", "two", {"input_shape": "ids:1,4;shift:1,1,8"}, None),
    ("19 main_impl: no such mode", "fixed", {"mode": "2"}, "E10001"),
    ("19 E10010: --log", "fixed", {"log": "loud"}, "E10010"),
    ("19 E10055: an option that the emulator lacks", "fixed", {"singleop": "x.json"}, "E10055"),
]


@pytest.mark.parametrize("rule, model, options, code", RULES, ids=[rule for rule, *_ in RULES])
def test_rules(
    atc: Atc, models: dict[str, str], rule: str, model: str, options: dict[str, str | None], code: str | None
) -> None:
    path = models.get(model, "/no/such/model.onnx" if model else "")
    returned, text = atc.convert(model=path, **options)
    assert text.startswith("ATC start working now")
    if code is None:
        assert returned == 0, text
        assert "ATC run success, welcome to the next use." in text
        assert (atc.directory / "out.om").exists()
    else:
        assert returned != 0
        assert "ATC run failed" in text
        assert f"\n{code}: " in text
        assert not (atc.directory / "out.om").exists()


def test_paths_of_what_is_read_count_behind_links(atc: Atc, models: dict[str, str]) -> None:
    """Rule 3: CheckInputPathValid in base/common/util.cc."""
    (atc.directory / "my models").mkdir()
    shutil.copy(models["fixed"], atc.directory / "my models/m.onnx")
    (atc.directory / "link").symlink_to("my models")
    returned, text = atc.convert(model=str(atc.directory / "link/m.onnx"))
    assert returned != 0 and "E10001: " in text and "can only contain" in text
    assert atc.convert(model=models["fixed"], output=str(atc.directory / "模型"))[0] == 0


def test_a_full_disk(models: dict[str, str], tmp_path: Path) -> None:
    """E13004, and nothing half-written. Here no file can have a byte, of which a write says what it says then."""
    command = ["atc", "--framework=5", f"--output={tmp_path / 'out'}", f"--soc_version={SOC}"]
    script = 'trap "" XFSZ; ulimit -f 0; exec "$@"'
    done = subprocess.run(
        ["bash", "-c", script, "-", *command, f"--model={models['fixed']}"], capture_output=True, text=True
    )
    assert done.returncode != 0 and "ATC run failed" in done.stdout
    assert f"E13004: Failed to write file {tmp_path / 'out.om'}. Reason: [Error 27] File too large." in done.stdout
    assert not list(tmp_path.iterdir())


def test_unlimited_shapes_are_refused_by_name(atc: Atc, models: dict[str, str]) -> None:
    """Rule 6: CANN takes them; the emulator says that it does not."""
    for shape in ("x:-1,16", "x:1~4,16"):
        returned, text = atc.convert(model=models["open"], input_shape=shape)
        assert returned != 0
        assert "E10055: " in text and "unlimited shapes" in text


STATIC = "aipp_mode: static input_format: RGB888_U8"
YUV = "aipp_mode: static input_format: YUV420SP_U8"


@pytest.mark.parametrize(
    "rule, content, options, code",
    [
        ("13 E10001: beside --dynamic_dims", STATIC, {**IMAGE, "dynamic_dims": "4,4;8,8"}, "E10001"),
        ("13 E10034: beside float16 inputs", STATIC, {"input_fp16_nodes": "image"}, "E10034"),
        ("12 CLI --input_format: NCHW only", STATIC, {"input_format": "ND"}, "E10001"),
        ("13 E10052: input_format is required", "aipp_mode: static", {}, "E10052"),
        ("13 config_file_template: no such format", "aipp_mode: static input_format: RGB", {}, "E10052"),
        ("13 config_file_template: no such parameter", f"{STATIC} mean: 3", {}, "E10052"),
        ("13 config_file_template: width", f"{STATIC} src_image_size_w: 5000", {}, "E10052"),
        ("13 config_file_template: crop needs the size", f"{STATIC} crop: true", {}, "E10052"),
        (
            "13 E10052: crop with --dynamic_image_size",
            f"{STATIC} crop: true src_image_size_w: 8 src_image_size_h: 8",
            {**IMAGE, "dynamic_image_size": "4,4;8,8"},
            "E10052",
        ),
        ("13 config_file_template: another size", f"{STATIC} src_image_size_w: 9 src_image_size_h: 4", {}, "E10052"),
        ("13 config_file_template", f"{STATIC} mean_chn_0: 3", {}, None),
        ("13 emulator: dynamic AIPP", "aipp_mode: dynamic max_src_image_size: 48", {}, "E10052"),
        (
            "13 config_file_template: YUV's size is even",
            f"{YUV} src_image_size_w: 4 src_image_size_h: 5",
            {},
            "E10052",
        ),
        (
            "13 config_file_template: YUV is cut at even places",
            f"{YUV} crop: true src_image_size_w: 8 src_image_size_h: 8 load_start_pos_w: 1",
            {},
            "E10052",
        ),
    ],
)
def test_rules_of_aipp(
    atc: Atc, models: dict[str, str], rule: str, content: str, options: dict[str, str | None], code: str | None
) -> None:
    configuration = atc.directory / "aipp.cfg"
    configuration.write_text(f"aipp_op {{ {content} }}")
    options = {"input_shape": "image:1,3,4,4", **options}
    returned, text = atc.convert(model=models["image"], insert_op_conf=str(configuration), **options)
    assert (returned == 0) == (code is None), text
    assert code is None or f"\n{code}: " in text


def test_a_command_line_that_cannot_be_read(atc: Atc) -> None:
    for options, message in [
        (["--modle=x"], "unknown command line flag 'modle'"),
        (["--model"], "flag '--model' is missing its argument"),
        (["model.onnx"], "Non-option parameter: model.onnx"),
    ]:
        returned, text = atc(*options)
        assert returned != 0
        assert message in text


def test_help(atc: Atc) -> None:
    for option in ("--help", "--h"):
        returned, text = atc(option)
        assert returned == 0
        assert "usage: atc <args>" in text
        assert "--dynamic_batch_size" in text


def test_the_command(models: dict[str, str], tmp_path: Path) -> None:
    """Rule 4: everything is on stdout, and a failure is a code that is not 0."""
    program = shutil.which("atc")
    assert program is not None
    command = [program, "--framework=5", f"--output={tmp_path / 'out'}", f"--soc_version={SOC}"]
    done = subprocess.run([*command, f"--model={models['fixed']}"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out.om").read_bytes()[:4] != b"IMOD"
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr == ""
    assert "E10054: " in done.stdout


def test_a_model_is_shown_and_written_as_json(atc: Atc, models: dict[str, str]) -> None:
    """Rule 19: the other modes."""
    assert atc.convert(model=models["fixed"])[0] == 0
    om, written = str(atc.directory / "out.om"), atc.directory / "out.json"
    returned, text = atc("--mode=6", f"--om={om}")
    assert returned == 0
    assert f"soc_version[{SOC}]" in text
    assert f"--model={models['fixed']}" in text
    assert "E10057: " in atc("--mode=6", f"--om={om}", "--framework=5")[1]
    assert "E10004: " in atc("--mode=6")[1]
    assert "E10041: " in atc("--mode=6", f"--om={models['fixed']}")[1]
    assert atc("--mode=1", f"--om={om}", f"--json={written}")[0] == 0
    model = json.loads(written.read_text())
    assert [tensor["name"] for tensor in model["input"]] == ["x"]
    assert atc("--mode=1", "--framework=5", f"--om={models['fixed']}", f"--json={written}")[0] == 0
    assert "MatMul" in written.read_text()


def test_a_check_writes_a_report_and_no_model(atc: Atc, models: dict[str, str]) -> None:
    report = atc.directory / "report.json"
    assert atc.convert(mode="3", model=models["fixed"], check_report=str(report))[0] == 0
    assert json.loads(report.read_text())["result"] == "success"
    assert not (atc.directory / "out.om").exists()
    assert atc.convert(mode="3", model=models["new"], check_report=str(report))[0] != 0
    assert "E16002" in json.loads(report.read_text())["reason"]
