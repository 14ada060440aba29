"""Runs diffusers' own tests against the installed diffusers, on the CPU or an NPU, and compares two runs.

    git clone --depth 1 --branch v0.42.1 https://github.com/huggingface/diffusers
    pip install -r requirements-dev.txt -r scripts/upstream/requirements-diffusers-tests.txt
    run="python scripts/upstream/run_diffusers_tests.py --source diffusers"
    bash apply_patch.sh --revert && $run --output upstream.json
    bash apply_patch.sh          && $run --output fork.json --compare upstream.json

On an emulated NPU, against the run on the CPU:

    python -m emulator run --soc Ascend910B3 -- $run --device npu --output npu.json --compare fork.json

Which tests: the files that exercise what the patches touch (FILES). Of these the slow and nightly ones and those
that need a GPU skip themselves. Without --online nothing is fetched: the tiny tokenizers and models that most
pipeline tests start from are replaced by stand-ins (hub_stand_ins.py), other fetches fail. Numbers that upstream
recorded with the real ones then do not match, with either diffusers; --compare tells what is due to the patches.

Exit codes: 0 every test that passed in BASELINE passes (without --compare: the tests ran), 1 one does not or the
tests could not run, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts.fork.fork_wheel import ArgumentParser, ForkError, run_command
from scripts.upstream.hub_stand_ins import write_stand_ins

FILES = (
    "tests/models/test_activations.py",
    "tests/models/test_attention_dispatch.py",
    "tests/models/test_attention_processor.py",
    "tests/models/test_layers_utils.py",
    "tests/models/transformers/test_models_transformer_flux.py",
    "tests/models/transformers/test_models_transformer_hidream.py",
    "tests/models/transformers/test_models_transformer_sd3.py",
    "tests/models/unets/test_models_unet_2d_condition.py",
    "tests/models/unets/test_unet_2d_blocks.py",
    "tests/pipelines/controlnet/test_controlnet.py",
    "tests/pipelines/hidream_image/test_pipeline_hidream.py",
    "tests/pipelines/stable_diffusion/test_stable_diffusion.py",
    "tests/pipelines/stable_diffusion/test_stable_diffusion_img2img.py",
    "tests/pipelines/stable_diffusion/test_stable_diffusion_inpaint.py",
    "tests/pipelines/stable_diffusion_2/test_stable_diffusion.py",
    "tests/pipelines/stable_diffusion_xl/test_stable_diffusion_xl.py",
    "tests/pipelines/stable_diffusion_xl/test_stable_diffusion_xl_img2img.py",
)
SECONDS_PER_TEST = 600
NPU_SPEC = Path(__file__).with_name("npu_device_spec.py")

Outcomes = dict[str, dict[str, str]]  # test -> {"outcome": passed | failed | skipped, "reason": one line}


def run_tests(source: Path, online: bool, device: str, files: Sequence[str] = FILES) -> dict[str, Any]:
    """Runs `files` of the checkout `source` on `device`. Says which diffusers was tested and how each test ended."""
    missing = [name for name in files if not (source / name).is_file()]
    if missing:
        raise ForkError(f"{source} is no checkout of huggingface/diffusers: it lacks {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as scratch:
        # The tests alone: next to src/, they would import diffusers from there.
        shutil.copytree(source / "tests", Path(scratch, "tests"))
        report, environment = Path(scratch, "report.xml"), make_environment(Path(scratch), online, device)
        pytest = [sys.executable, "-m", "pytest", "--quiet", "-p", "no:cacheprovider", f"--timeout={SECONDS_PER_TEST}"]
        result = subprocess.run([*pytest, f"--junitxml={report}", *files], cwd=scratch, env=environment)
        if result.returncode not in (0, 1):  # 1: there are failed tests
            raise ForkError(f"pytest ended with exit code {result.returncode}, see above")
        tests = read_report(report)
        code = "import diffusers; print(diffusers.__version__, diffusers.__path__[0], sep='\\n')"
        version, path = subprocess.check_output(
            [sys.executable, "-c", code], cwd=scratch, env=environment, text=True
        ).splitlines()
    counts = Counter(test["outcome"] for test in tests.values())
    return {"diffusers": version, "path": path, "counts": dict(sorted(counts.items())), "tests": tests}


def make_environment(scratch: Path, online: bool, device: str) -> dict[str, str]:
    environment = os.environ | {"DIFFUSERS_TEST_DEVICE": device, "RUN_SLOW": "0", "RUN_NIGHTLY": "0"}
    if device == "npu":
        shutil.copy(NPU_SPEC, scratch)
        # With the task queue a failed launch would end all later tests too.
        environment |= {"DIFFUSERS_TEST_BACKEND": "torch_npu", "DIFFUSERS_TEST_DEVICE_SPEC": NPU_SPEC.name}
        environment |= {"TASK_QUEUE_ENABLE": "0"}
    if not online:
        write_stand_ins(scratch / "huggingface")
        environment |= {"HF_HOME": str(scratch / "huggingface"), "HF_HUB_OFFLINE": "1"}
    return environment


def read_report(report: Path) -> Outcomes:
    tests: Outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if problem is None else "skipped" if problem.tag == "skipped" else "failed"
        message = "" if problem is None else problem.get("message", "").strip()
        reason = message.splitlines()[0][:200] if message else ""
        tests[f"{case.get('classname')}::{case.get('name')}"] = {"outcome": outcome, "reason": reason}
    return tests


def only(files: Sequence[str], outcomes: dict[str, Any]) -> dict[str, Any]:
    """The outcomes of the tests of `files`."""
    modules = tuple(f"{name.removesuffix('.py').replace('/', '.')}." for name in files)
    return outcomes | {"tests": {name: test for name, test in outcomes["tests"].items() if name.startswith(modules)}}


def compare(baseline: dict[str, Any], current: dict[str, Any]) -> int:
    """Prints every test that ended otherwise than in `baseline`; returns how many passed there and do not now."""
    before, after = baseline["tests"], current["tests"]
    absent = {"outcome": "absent", "reason": ""}
    lost = 0
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, absent), after.get(name, absent)
        lost += old["outcome"] == "passed" != new["outcome"]
        if old["outcome"] != new["outcome"]:
            print(f"{name}: {old['outcome']} -> {new['outcome']} {new['reason']}")
        elif old != new:
            print(f"{name}: {new['outcome']}, but otherwise: {old['reason']} -> {new['reason']}")
    print(f"diffusers {baseline['diffusers']} -> {current['diffusers']}: {lost} tests passed before and do not now")
    return lost


def write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    temporary.replace(path)


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        prog="run_diffusers_tests.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", metavar="DIR", type=Path, required=True, help="checkout of huggingface/diffusers")
    parser.add_argument("--output", metavar="FILE", type=Path, required=True, help="where the outcomes go, as JSON")
    parser.add_argument("--compare", metavar="BASELINE", type=Path, help="outcomes of an earlier run to compare with")
    parser.add_argument("--device", choices=("cpu", "npu"), default="cpu", help="what the tests run on (cpu)")
    parser.add_argument("--files", nargs="+", metavar="FILE", default=FILES, help="test files of the checkout (FILES)")
    parser.add_argument("--online", action="store_true", help="fetch from the hub what the tests ask for")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    baseline = json.loads(arguments.compare.read_text("utf-8")) if arguments.compare else None
    outcomes = run_tests(arguments.source, arguments.online, arguments.device, arguments.files)
    write_json(arguments.output, outcomes)
    print(f"diffusers {outcomes['diffusers']} in {outcomes['path']}: {outcomes['counts']}")
    if baseline and arguments.files is not FILES:
        baseline = only(arguments.files, baseline)
    return 1 if baseline and compare(baseline, outcomes) else 0


if __name__ == "__main__":
    run_command("run_diffusers_tests.py", main)
