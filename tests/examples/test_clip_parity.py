"""The table of what CLIP's programs have to match: each name, flag and default, and each defect of the original.

The original is Large-Model-Tutorial's `code/04-deployment/huawei`: pytorch_npu_inference.py, convert_to_om.py,
benchmark.py and deploy.sh. Its code was not copied.
"""

import ast
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runners.clip import CLIPInferenceService, arguments, benchmark_run, deploy
from runners.clip.benchmark import PerformanceBenchmark
from runners.offline import run as convert_run
from runners.offline.converter import ModelConverter
from scripts.demo_clip.train import DEMO_CLIP
from tests.programs import ROOT

MODEL = "openai/clip-vit-base-patch32"
CATS = ["a photo of a cat", "a photo of a dog"]
CHIP = "Ascend910"  # the original's default, which is no chip's name

# The original's methods with their arguments and defaults; `...` stands for none.
METHODS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (CLIPInferenceService.__init__, {"model_path": ..., "device": "auto", "use_fp16": False}),
    (CLIPInferenceService.predict, {"image": ..., "texts": ...}),
    (CLIPInferenceService.extract_image_features, {"images": ..., "normalize": True}),
    (CLIPInferenceService.extract_text_features, {"texts": ..., "normalize": True}),
    (CLIPInferenceService.batch_predict, {"images": ..., "texts": ..., "batch_size": 4}),
    (CLIPInferenceService.benchmark, {"image": ..., "texts": ..., "num_runs": 100, "warmup_runs": 10}),
    (ModelConverter.__init__, {"soc_version": CHIP}),
    (
        ModelConverter.convert_onnx_to_om,
        {"onnx_path": ..., "output_path": ..., "input_shape": None, "dynamic_dims": None},
    ),
    (
        ModelConverter.convert_pytorch_to_onnx,
        {
            "model": ...,
            "dummy_input": ...,
            "output_path": ...,
            "input_names": ...,
            "output_names": ...,
            "dynamic_axes": None,
            "opset_version": 11,
        },
    ),
    (
        ModelConverter.convert_clip_model,
        {
            "model_path": ...,
            "output_dir": ...,
            "batch_size": 1,
            "image_size": 224,
            "text_length": 77,
            "dynamic_batch": False,
        },
    ),
    (PerformanceBenchmark.__init__, {"model_path": MODEL}),
    (
        PerformanceBenchmark.benchmark_device,
        {"device": ..., "image_path": ..., "texts": ..., "num_runs": 100, "warmup_runs": 10, "use_fp16": False},
    ),
    (
        PerformanceBenchmark.run_comparison,
        {"image_path": ..., "texts": ..., "devices": None, "num_runs": 100, "test_fp16": True},
    ),
    (PerformanceBenchmark.print_comparison_table, {}),
    (PerformanceBenchmark.save_results, {"path": ...}),
]
# Its programs, what they need to be given, and their flags with defaults.
FLAGS: list[tuple[Callable[..., Any], list[str], dict[str, Any]]] = [
    (
        partial(arguments.parse_arguments, "pytorch_npu_inference.py", ""),
        ["--image", "a.png"],
        {"--model": MODEL, "--texts": CATS, "--device": "auto", "--fp16": False, "--benchmark": False},
    ),
    (
        partial(convert_run.parse_arguments, "convert_to_om.py", ""),
        ["clip", "--output-dir", "out"],
        {
            "--model": MODEL,
            "--batch-size": 1,
            "--image-size": 224,
            "--text-length": 77,
            "--dynamic-batch": False,
            "--soc-version": CHIP,
        },
    ),
    (
        partial(convert_run.parse_arguments, "convert_to_om.py", ""),
        ["onnx", "--model", "a.onnx", "--output", "a.om"],
        {"--input-shape": None, "--dynamic-dims": None, "--soc-version": CHIP},
    ),
    (
        partial(benchmark_run.parse_arguments, "benchmark.py", ""),
        ["--image", "{picture}"],
        {
            "--model": MODEL,
            "--texts": CATS,
            "--devices": None,
            "--num-runs": 100,
            "--no-fp16": False,
            "--output": Path("benchmark_results.json"),
        },
    ),
    (
        partial(deploy.parse_arguments, "deploy.sh", "", DEMO_CLIP),
        [],
        {
            "--model": MODEL,
            "--output-dir": Path("./deployed_models"),
            "--soc-version": CHIP,
            "--batch-size": 1,
            "--dynamic-batch": False,
            "--no-benchmark": False,
            "--num-runs": 100,
        },
    ),
]
# Ours where it differs: of (program or method, name) the default, and why.
OURS: dict[tuple[str, str], tuple[Any, str]] = {
    ("deploy.sh", "--model"): (str(DEMO_CLIP), "runs without a network, and says which model it is"),
    ("ModelConverter.convert_pytorch_to_onnx", "opset_version"): (18, "CLIP's operators are not in 11"),
    **dict.fromkeys(
        [(program, "--soc-version") for program in ("deploy.sh", "convert_to_om.py")]
        + [("ModelConverter.__init__", "soc_version")],
        (None, "the chip that is there"),
    ),
    **dict.fromkeys(
        [
            ("convert_to_om.py", "--image-size"),
            ("convert_to_om.py", "--text-length"),
            ("ModelConverter.convert_clip_model", "image_size"),
            ("ModelConverter.convert_clip_model", "text_length"),
        ],
        (None, "the model's own"),
    ),
}
# What was wrong with the original, and the tests that would find it here.
DEFECTS: list[tuple[str, list[str]]] = [
    (
        "1 nothing loads an .om",
        ["on_npu/test_clip_offline.py::test_deployed_with_profiles", "on_npu/test_om.py::test_profiles_of_the_batch"],
    ),
    (
        "2 one batch for pictures and texts, so that one picture with several texts cannot be asked",
        ["runners/offline/test_converter.py::test_both_towers_answer_as_the_model"],
    ),
    (
        "3 profiles with one value for three open dimensions",
        [
            "ascend/test_atc.py::test_a_profile_has_a_value_for_every_open_dimension",
            "ascend/test_atc.py::test_what_atc_would_refuse",
            "runners/offline/test_converter.py::test_offline_models_of_both_towers",
        ],
    ),
    (
        "4 families in the list of chips",
        [
            "ascend/test_atc.py::test_a_family_is_no_chip",
            "ascend/test_atc.py::test_names_of_chips",
            "examples/test_clip_parity.py::test_attributes",
        ],
    ),
    (
        "5 an opset that lacks the model's operators, and outputs without names",
        ["runners/offline/test_converter.py::test_files_hold_what_cann_reads"],
    ),
    (
        "6 failures exit with 0 and say nothing",
        [
            "examples/test_clip.py::test_a_conversion_that_fails_has_an_exit_code",
            "ascend/test_atc.py::test_a_failure_says_what_atc_said_and_leaves_nothing",
        ],
    ),
    ("7 batches of one", ["runners/clip/test_service.py::test_a_batch_is_one_forward"]),
    (
        "8 times that begin before the device is idle, and leave out what a caller waits for",
        [
            "runners/clip/test_timing.py::test_the_device_is_idle_before_each_call_and_done_after_it",
            "runners/clip/test_timing.py::test_a_percentile_needs_samples_beyond_it",
            "runners/clip/test_timing.py::test_the_clock_is_none_that_is_set_while_it_runs",
            "runners/clip/test_service.py::test_benchmark_has_the_promised_keys",
            "runners/clip/test_benchmark.py::test_a_row_has_speed_accuracy_and_batches",
        ],
    ),
    (
        "9 a peak that is none, and of other devices' runs",
        [
            "on_npu/test_clip.py::test_benchmark_counts_memory_of_its_own_run",
            "runners/clip/test_benchmark.py::test_devices_are_measured_in_processes_of_their_own",
        ],
    ),
    (
        "10 a comparison that needs torch_npu",
        [
            "runners/clip/test_benchmark.py::test_an_absent_device_is_a_line_and_no_row",
            "runners/clip/test_benchmark.py::test_results_of_several_environments_are_merged",
            "ascend/test_device.py::test_a_torch_npu_that_does_not_load_is_named_only_when_an_npu_is_asked_for",
        ],
    ),
    (
        "11 no accuracy beside the speed, and no environment",
        [
            "runners/clip/test_benchmark.py::test_accuracy_is_of_the_configuration",
            "runners/clip/test_benchmark.py::test_results_of_several_environments_are_merged",
            "runners/clip/test_gate.py::test_answers_that_change_are_counted",
            "runners/clip/test_gate.py::test_one_feature_that_is_off_is_enough",
        ],
    ),
    (
        "12 transformers 5, texts that are too long, pictures of any kind",
        [
            "runners/clip/test_service.py::test_features_have_length_one_unless_asked",
            "runners/clip/test_service.py::test_a_text_that_is_too_long_is_cut_and_that_is_said",
            "runners/clip/test_service.py::test_no_picture_is_refused",
            "runners/clip/test_service.py::test_texts_that_say_nothing_are_refused",
            "runners/clip/test_inputs.py::test_turned_by_exif",
            "runners/clip/test_inputs.py::test_what_is_no_picture_is_named",
        ],
    ),
    (
        "13 a deploy.sh that converts nothing, reports nothing and runs in its own folder alone",
        [
            "examples/test_clip_deploy.py::test_without_atc_it_ends_at_onnx_files_and_says_so",
            "examples/test_clip_deploy.py::test_it_ends_at_the_first_failure",
            "examples/test_clip_deploy.py::test_the_script_passes_all_on_from_any_folder",
            "on_npu/test_clip_offline.py::test_deployed_with_profiles",
        ],
    ),
    ("14 versions of years ago", ["examples/test_clip_parity.py::test_torch_npu_is_that_of_torch"]),
    (
        "15 work at the interpreter's end, pictures in messages",
        [
            "examples/test_clip_parity.py::test_nothing_happens_at_the_end",
            "examples/test_clip_parity.py::test_messages_are_plain",
        ],
    ),
]


def ours(where: str, theirs: dict[str, Any]) -> dict[str, Any]:
    """The defaults that are expected here."""
    return {name: OURS.get((where, name), (default,))[0] for name, default in theirs.items()}


@pytest.mark.parametrize("method, theirs", METHODS, ids=lambda value: getattr(value, "__qualname__", ""))
def test_names_and_defaults(method: Callable[..., Any], theirs: dict[str, Any]) -> None:
    parameters = dict(list(inspect.signature(method).parameters.items())[1 : len(theirs) + 1])
    defaults = {name: ... if p.default is p.empty else p.default for name, p in parameters.items()}
    assert defaults == ours(method.__qualname__, theirs)


@pytest.mark.parametrize("parse, given, theirs", FLAGS, ids=lambda value: getattr(value, "args", [""])[0])
def test_flags_and_defaults(parse: Any, given: list[str], theirs: dict[str, Any], tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "picture.png")
    args = vars(parse([each.format(picture=tmp_path / "picture.png") for each in given]))
    found = {flag: args[flag.removeprefix("--").replace("-", "_")] for flag in theirs}
    assert found == ours(parse.args[0], theirs)


def test_what_differs_is_in_the_table_once() -> None:
    asked = {(method.__qualname__, name) for method, theirs in METHODS for name in theirs}
    asked |= {(parse.args[0], name) for parse, _, theirs in FLAGS for name in theirs}
    assert OURS.keys() <= asked and all(why for _, why in OURS.values())


def test_attributes() -> None:
    assert {"Ascend310P3", "Ascend310B1", "Ascend910B3", "Ascend910_9391"} <= {*ModelConverter.SUPPORTED_SOC}
    assert not {"Ascend310P", "Ascend910", "Ascend910B"} & {*ModelConverter.SUPPORTED_SOC}
    assert PerformanceBenchmark(MODEL).results == {}


@pytest.mark.parametrize(
    "defect, tests", DEFECTS, ids=lambda value: value.partition(" ")[0] if isinstance(value, str) else ""
)
def test_each_defect_has_tests(defect: str, tests: list[str]) -> None:
    for test in tests:
        file, _, name = test.partition("::")
        functions = ast.parse((ROOT / "tests" / file).read_text()).body
        (found,) = (each for each in functions if isinstance(each, ast.FunctionDef) and each.name == name)
        assert "pytest.mark.slow" not in map(ast.unparse, found.decorator_list), f"{test} does not always run"


def test_there_are_fifteen() -> None:
    assert [int(defect.split()[0]) for defect, _ in DEFECTS] == [*range(1, 16)]


def test_torch_npu_is_that_of_torch() -> None:
    def pinned(file: str, package: str) -> str:
        lines = (ROOT / file).read_text().splitlines()
        (version,) = (line.partition("==")[2].split()[0] for line in lines if line.startswith(f"{package}=="))
        return version

    assert pinned("requirements-npu.txt", "torch_npu") == pinned("requirements.txt", "torch")


OURS_ALONE = [
    path for folder in ("runners/clip", "runners/offline", "examples/clip") for path in (ROOT / folder).rglob("*.py")
]


@pytest.mark.parametrize("path", OURS_ALONE, ids=lambda path: path.name)
def test_nothing_happens_at_the_end(path: Path) -> None:
    assert not {"__del__", "atexit"} & {*path.read_text().replace("(", " ").replace(".", " ").split()}


@pytest.mark.parametrize("path", OURS_ALONE, ids=lambda path: path.name)
def test_messages_are_plain(path: Path) -> None:
    assert path.read_text(encoding="utf-8").isascii()
