"""Runs ONNX's own tests of its operators as offline models, on a card or the emulator.

    pip install -r requirements-dev.txt
    python -m emulator run --soc Ascend910B3 -- \\
        python scripts/upstream/run_onnx_tests.py --soc_version Ascend910B3 --output Ascend910B3.json

Each test is a model of a node or a few, with inputs and the outputs that the standard says (onnx.backend.test). `atc`
converts the model, with --precision_mode_v2=origin, and `ascend.om` runs it. The standard gives most tests the newest
opset, which CANN does not read: such a model is restated in opset 18, if onnx's checker finds it valid there. What
CANN must know when it compiles, as the shape of a Reshape, is made a constant, which it is in models that exporters
write.

A test is "not applicable" if the model is of a newer opset, holds what is no tensor, or is refused with the reason: an
operator that is not mapped, an attribute that CANN's parser does not read, a dtype that the chip does not have.

Exit codes: 0 every test that applies passes, 1 one does not or the tests could not run, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.backend.test.case.test_case import TestCase
from tqdm import tqdm

from scripts.fork.fork_wheel import ArgumentParser, ForkError, run_command
from scripts.upstream.run_diffusers_tests import Outcomes, write_json
from scripts.upstream.run_npu_op_tests import count, names_of

OPSETS = range(8, 19)  # that CANN's parser reads

# The inputs of an operator that CANN must know when it compiles.
KNOWN_INPUTS: dict[str, tuple[int, ...]] = {
    "ConstantOfShape": (0,),
    "CumSum": (1,),
    "Expand": (1,),
    "Pad": (1, 2, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "Trilu": (1,),
    "Unsqueeze": (1,),
} | {name: (1,) for name in ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum")}

# (what atc or the run says, why the test does not count): the first that is found.
NOT_APPLICABLE: tuple[tuple[str, str], ...] = (
    (r"E16002: .*::(\d+::\w+)\.", "no parser for {}"),
    (r"which (\w+) does not have", "a dtype that the chip does not have"),
    (r"not implemented for 'UInt", "a dtype that the chip does not have"),
    (r"E11010: (.+?) \(ONNX node", "CANN refuses it: {}"),
    (r"E10055: .*?Reason: (\w[^\n]*?) \(ONNX node", "refused: {}"),
    (r"E16001: (.+)", "CANN refuses it: {}"),
    (r"E19999: (CANN takes no .+?) \(ONNX node", "CANN refuses it: {}"),
    (r"the (?:input|tensor) .+ emulated", "refused: no tensor of a dtype that torch has"),
    (r"attributes than `value`", "refused: a Constant that is no `value`, which CANN does not read"),
    (r"nearest_mode \w+ (would change the result)", "refused: a nearest_mode that CANN does not read {}"),
    (r"(a power of whole numbers .+|a scatter that reduces .+|split_with_sizes expects)", "refused: {}"),
    (r"fmod=0", "refused: a Mod of the second operand's sign, which CANN does not read"),
    (r"am(?:ax|in)\(\): Expected", "refused: the extreme of nothing"),
    (r"Pad_7\): the values of paddings must be known", "refused: a shape that is computed from an input"),
    (r"(padding by \w+ is not emulated)", "refused: {}"),
    (r"has an unlimited shape", "an empty tensor, which offline models do not take"),
)
PRODUCTS = {"Conv", "Gemm", "MatMul"}  # operands are rounded: to float16 on 310P, to HF32 in convolutions elsewhere
ROUNDED = 4e-3  # of the largest value


class NotApplicable(Exception):
    """Why the test does not count."""


def restate(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model`, in an opset that CANN reads."""
    opsets = {opset.domain: opset for opset in model.opset_import}
    if set(opsets) != {""}:
        raise NotApplicable(f"operators of {', '.join(sorted(set(opsets) - {''}))}")
    if opsets[""].version in OPSETS:
        return model
    restated = onnx.ModelProto()
    restated.CopyFrom(model)
    restated.opset_import[0].version = OPSETS[-1]
    try:
        onnx.checker.check_model(restated, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        raise NotApplicable(f"is valid only in opset {opsets[''].version}") from None
    return restated


def with_constants(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> onnx.ModelProto:
    """`model` with constants for what CANN must know, which leave `feeds`. CANN takes no model without inputs."""
    names = {
        node.input[i]
        for node in model.graph.node
        for i in KNOWN_INPUTS.get(node.op_type, ())
        if i < len(node.input) and node.input[i] in feeds
    }
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.graph.input[:]
    changed.graph.input.extend(value for value in model.graph.input if value.name not in names)
    changed.graph.initializer.extend(numpy_helper.from_array(feeds.pop(name), name) for name in sorted(names))
    if not feeds:
        feeds["unused"] = np.zeros(1, np.float32)
        changed.graph.input.append(helper.make_tensor_value_info("unused", onnx.TensorProto.FLOAT, [1]))
    return changed


def tensors(values: Iterable[Any]) -> list[np.ndarray]:
    arrays = [numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value for value in values]
    if not all(isinstance(array, np.ndarray | np.generic) for array in arrays):
        raise NotApplicable("a value is no tensor")
    if any(array.dtype.kind not in "biuf" for array in arrays):
        raise NotApplicable("a dtype that numpy and the chips do not share")
    return [np.asarray(array) for array in arrays]


def convert(model: onnx.ModelProto, scratch: Path, soc: str) -> Path:
    source = scratch / "model.onnx"
    onnx.save(model, source)
    output = scratch / "model"
    options = [f"--model={source}", f"--output={output}", f"--soc_version={soc}", "--framework=5"]
    done = subprocess.run(["atc", *options, "--precision_mode_v2=origin"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout.partition("for more information")[2].strip() or done.stdout)
    return next(scratch.glob("model*.om"))


def compare(
    case: TestCase, model: onnx.ModelProto, results: list[np.ndarray], expected: list[np.ndarray], soc: str
) -> None:
    rounded = any(node.op_type in PRODUCTS for node in model.graph.node)
    for result, wanted in zip(results, expected, strict=True):
        if (result.dtype, result.shape) != (wanted.dtype, wanted.shape):
            raise RuntimeError(f"{result.dtype} {result.shape} instead of {wanted.dtype} {wanted.shape}")
        if soc.startswith("Ascend310P") and wanted.dtype == np.float16 and not np.isfinite(wanted).all():
            raise NotApplicable("infinity or NaN in float16, which 310P does not have")
        largest = float(np.max(np.abs(wanted.astype(np.float64)), initial=0, where=np.isfinite(wanted)))
        atol = max(case.atol, ROUNDED * largest) if rounded and wanted.dtype.kind == "f" else case.atol
        np.testing.assert_allclose(result, wanted, case.rtol, atol)


def run_case(case: TestCase, scratch: Path, soc: str) -> None:
    from ascend.om import OmSession

    source = case.model
    if source is None or case.data_sets is None:
        raise NotApplicable("has no model of its own")
    for inputs, outputs in case.data_sets:
        feeds = dict(zip([value.name for value in source.graph.input], tensors(inputs), strict=True))
        expected = tensors(outputs)
        model = with_constants(restate(source), feeds)
        with OmSession(convert(model, scratch, soc)) as session:
            compare(case, model, list(session.run(feeds).values()), expected, soc)


def judge(reason: str) -> dict[str, str]:
    for pattern, explanation in NOT_APPLICABLE:
        if found := re.search(pattern, reason):
            return {"outcome": "not applicable", "reason": explanation.format(*found.groups())}
    return {"outcome": "failed", "reason": " ".join(reason.split())[:300]}


def outcome_of(task: tuple[int, str]) -> tuple[str, dict[str, str]]:
    """How test number `task[0]` ended on the chip `task[1]`. A process of its own: a failed launch ends all others."""
    case = CASES[task[0]]
    with tempfile.TemporaryDirectory() as scratch:
        try:
            run_case(case, Path(scratch), task[1])
        except NotApplicable as reason:
            return case.name, {"outcome": "not applicable", "reason": str(reason)}
        except (RuntimeError, AssertionError, ValueError) as error:
            return case.name, judge(str(error))
    return case.name, {"outcome": "passed", "reason": ""}


CASES: list[TestCase] = []  # filled before the processes fork


def run_all(soc: str, jobs: int) -> Iterator[tuple[str, dict[str, str]]]:
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=1) as pool:
        yield from pool.imap_unordered(outcome_of, [(number, soc) for number in range(len(CASES))])


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        prog="run_onnx_tests.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--soc_version", metavar="CHIP", required=True, help="as atc has it: Ascend310P3, Ascend910B3")
    parser.add_argument("--output", metavar="FILE", type=Path, required=True, help="where the outcomes go, as JSON")
    parser.add_argument("--only", metavar="PATTERN", nargs="+", default=["*"], help="the tests that fit: 'test_add*'")
    parser.add_argument("--jobs", metavar="N", type=int, default=2, help="how many run at a time (2)")
    return parser.parse_args()


def main() -> int:
    from onnx.backend.test.loader import load_node_model_tests

    arguments = parse_arguments()
    if shutil.which("atc") is None:
        raise ForkError("there is no atc on PATH: set CANN's environment, or see python -m emulator run --help")
    with np.errstate(all="ignore"):
        all_cases = load_node_model_tests()
    CASES.extend(case for case in all_cases if any(fnmatchcase(case.name, pattern) for pattern in arguments.only))
    if not CASES:
        raise ForkError(f"--only {' '.join(arguments.only)}: no test fits")
    tests: Outcomes = dict(sorted(tqdm(run_all(arguments.soc_version, arguments.jobs), total=len(CASES), unit="test")))
    counts = count(tests)
    write_json(
        arguments.output, {"chip": arguments.soc_version, "onnx": onnx.__version__, "counts": counts, "tests": tests}
    )
    for reason, number in Counter(reason for _, reason in names_of(tests, "not applicable")).most_common():
        print(f"not applicable ({number}): {reason}")
    for name, reason in names_of(tests, "failed"):
        print(f"failed: {name}: {reason}")
    print(f"onnx {onnx.__version__} on {arguments.soc_version}: {counts}")
    return 1 if any(names_of(tests, "failed")) else 0


if __name__ == "__main__":
    run_command("run_onnx_tests.py", main)
