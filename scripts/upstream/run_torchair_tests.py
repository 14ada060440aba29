"""Runs the cases that torchair's converters declare: each operator as a compiled graph against the same one in eager.

    python -m emulator run --soc Ascend310P3 -- python scripts/upstream/run_torchair_tests.py --output Ascend310P3.json

torchair converts each aten operator into operators of GE's graphs, and each converter lists calls that it supports;
torchair's own smoke test runs these on a card, and this does it wherever torch_npu sees an NPU. Which converters: the
forward ones (--only chooses among them). A case that eager refuses as well, on this chip, is "not applicable", and so
is what NOT_APPLICABLE names.

Exit codes: 0 every case that applies passes, 1 one does not or the cases could not run, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tqdm import tqdm

from scripts.fork.fork_wheel import ArgumentParser, ForkError, run_command
from scripts.upstream.run_diffusers_tests import Outcomes, write_json

# The backward pass, and what draws its numbers in another order than eager does.
LEFT_OUT = ("*backward*", "*_legit*", "*batch_norm_*")
RANDOM = ("aten.bernoulli*", "aten.rand*", "aten.uniform*", "aten.native_dropout*", "aten.multinomial*")
# Chip, case (an asterisk for any) and why it cannot pass on a card either.
NOT_APPLICABLE = (
    ("Ascend310P*", "aten._foreach_*", "GE has operators on lists for other chips only; eager goes tensor by tensor"),
    ("*", "aten._foreach_norm.Scalar*", "GE gives the norm a dimension, which torchair itself refuses"),
    ("*", "aten.fill.Tensor*", "torch takes a value without dimensions only, on every device"),
    ("*", "aten._log_softmax.default?1?", "torch takes half_to_float for half precision only, on every device"),
    ("*", "aten.linalg_vector_norm.default?8?", "torchair computes in float16 and casts the result, eager in float32"),
)
TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-4, torch.float64: 1e-4}


def find_converters(only: str) -> dict[str, Any]:
    """The declared converters with cases, by the name of their operator."""
    try:
        import torch_npu  # noqa: F401  registers the torchair alias
        import torchair._ge_concrete_graph.ge_converter.custom  # noqa: F401  declares those of torch_npu's operators
        from torchair._ge_concrete_graph.fx2ge_converter import _declare_supported_converters
    except ImportError as error:
        raise ForkError(f"torchair does not load: {error}\nWithout a card: python -m emulator run --help") from error
    declared = {str(operator): converter for operator, converter in _declare_supported_converters().items()}
    chosen = {
        name: converter
        for name, converter in sorted(declared.items())
        if converter.supported_cases
        and name.startswith(("aten.", "npu.", "prims."))
        and not any(fnmatchcase(name, pattern) for pattern in LEFT_OUT)
        and fnmatchcase(name, only)
    }
    if not chosen:
        raise ForkError(f"--only {only}: no converter fits")
    return chosen


def make(declared: Any) -> Any:
    """A case's argument: its tensors get their declared values, or random ones, on the NPU."""
    if isinstance(declared, (list, tuple)):
        return [make(item) for item in declared]
    if not hasattr(declared, "dims"):
        return declared
    if declared.value is not None:
        return torch.tensor(declared.value, dtype=declared.dtype, device="npu")
    low, high = declared.value_range or (None, None)
    numbers = torch.randn(*declared.dims) if low is None else torch.rand(*declared.dims) * (high - low) + low
    return numbers.to(declared.dtype).to("npu")


def call(operator: Callable[..., Any], case: Any) -> list[torch.Tensor]:
    """What `operator` returns for a case, as tensors on the CPU; the same inputs and random state in each call."""
    torch.manual_seed(0)
    torch.get_device_module("npu").manual_seed(0)
    arguments, keywords = make(case.args), {key: make(value) for key, value in case.kwargs.items()}
    results = operator(*arguments, **keywords)
    results = results if isinstance(results, (list, tuple)) else [results]
    return [torch.as_tensor(result).cpu() for result in results if result is not None]


def differs(name: str, actual: torch.Tensor, expected: torch.Tensor) -> str:
    """Why the two results are not the same, "" if they are."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"{actual.dtype} {tuple(actual.shape)} instead of {expected.dtype} {tuple(expected.shape)}"
    if any(fnmatchcase(name, pattern) for pattern in RANDOM):
        return ""
    tolerance = TOLERANCES.get(expected.dtype, 0)
    if torch.allclose(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True):
        return ""
    return f"differs by up to {(actual.double() - expected.double()).abs().max():.3g}"


def run_case(name: str, operator: Any, case: Any) -> dict[str, str]:
    def graph(*arguments: Any, **keywords: Any) -> Any:
        return operator(*arguments, **keywords)

    try:
        expected = call(operator, case)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        return {"outcome": "not applicable", "reason": f"eager: {first_line(error)}"}
    import torchair

    torch._dynamo.reset()
    compiled = torch.compile(graph, backend=torchair.get_npu_backend(), fullgraph=True, dynamic=False)
    try:
        actual = call(compiled, case)
    except Exception as error:  # whatever the compiler raises is the outcome of this case
        return {"outcome": "failed", "reason": first_line(error)}
    problems = [differs(name, *pair) for pair in zip(actual, expected, strict=False)]
    problem = next(filter(None, problems), "" if len(actual) == len(expected) else "the number of results differs")
    return {"outcome": "failed" if problem else "passed", "reason": problem}


def first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if "CANN emulator" in line] or str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def run_all(converters: dict[str, Any], chip: str) -> Iterator[tuple[str, dict[str, str]]]:
    for name, converter in converters.items():
        for index, case in enumerate(converter.supported_cases):
            outcome = run_case(name, converter._aten_op, case)
            reason = why_not_applicable(chip, f"{name}[{index}]")
            if outcome["outcome"] == "failed" and reason:
                outcome = {"outcome": "not applicable", "reason": f"{reason} ({outcome['reason']})"}
            yield f"{name}[{index}]", outcome


def why_not_applicable(chip: str, case: str) -> str:
    fitting = (why for chips, cases, why in NOT_APPLICABLE if fnmatchcase(chip, chips) and fnmatchcase(case, cases))
    return next(fitting, "")


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        prog="run_torchair_tests.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", metavar="FILE", type=Path, required=True, help="where the outcomes go, as JSON")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="run the operators that fit, as 'aten.add*'")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    converters = find_converters(arguments.only)
    npu = torch.get_device_module("npu")
    npu.set_task_queue_enable(0)  # a launch that fails in the queue makes all later ones fail
    npu.set_compile_mode(jit_compile=False)
    npu.config.allow_internal_format = False
    chip = npu.get_device_name(0)
    tests: Outcomes = {}
    with tqdm(total=sum(len(converter.supported_cases) for converter in converters.values()), unit="case") as progress:
        for name, outcome in run_all(converters, chip):
            tests[name] = outcome
            progress.set_postfix_str(f"{sum(test['outcome'] == 'failed' for test in tests.values())} failed")
            progress.update()
    counts = dict(Counter(test["outcome"] for test in tests.values()))
    write_json(arguments.output, {"chip": chip, "counts": counts, "tests": tests})
    for kind in ("not applicable", "failed"):
        for name, test in tests.items():
            if test["outcome"] == kind:
                print(f"{kind}: {name}: {test['reason']}")
    print(f"{chip}: {counts}")
    return 1 if counts.get("failed") else 0


if __name__ == "__main__":
    run_command("run_torchair_tests.py", main)
