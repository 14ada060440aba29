"""Checks this machine and environment, and says what to do about each thing that is wrong.

    python scripts/npu_setup/check_npu_setup.py                 the best device there is: NPU, then CUDA, then CPU
    python scripts/npu_setup/check_npu_setup.py --device npu    insist on an NPU
    python scripts/npu_setup/check_npu_setup.py --json          for programs
    python scripts/npu_setup/check_npu_setup.py --bundle FILE   and write all that is known into a file, for a report

It tries each operator that Stable Diffusion 2.1 depends on, at its shapes, against the CPU; on an NPU a compiled graph
as well, and on NPUs and GPUs a collective. That takes a minute or two.

Exit codes: 0 everything that the device needs is right (there may be warnings), 1 something is wrong, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
# torch must import even where torch_npu is installed and broken: saying so is what this program is for.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

from scripts.npu_setup import bundle
from scripts.npu_setup.checks import (
    ABSENT,
    FAILURE,
    OK,
    Result,
    check_cann,
    check_driver,
    check_fork,
    check_python,
    check_requirements,
    check_torch,
    check_torch_npu,
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="check_npu_setup.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("npu", "cuda", "cpu"), help="what is to work (the best device there is)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument(
        "--bundle", type=Path, metavar="FILE", help="write results, versions and settings as JSON there"
    )
    arguments = parser.parse_args()
    if arguments.bundle and not os.access(arguments.bundle.parent, os.W_OK):
        parser.error(f"--bundle {arguments.bundle}: its folder does not exist, or cannot be written to")
    return arguments


def run_checks(device: str | None) -> Iterator[Result]:
    installed = [check_python(), check_requirements(), check_torch(), check_fork()]
    yield from installed
    if device not in ("cuda", "cpu"):
        for result in (check_driver(), check_cann(), check_torch_npu()):
            if device == "npu" and result.status == ABSENT:
                result.status = FAILURE
            yield result
    if any(result.name in ("torch", "requirements") and result.status == FAILURE for result in installed):
        return

    from ascend.device import DeviceError, DeviceManager, get_device_info

    try:
        manager = DeviceManager(device)
    except DeviceError as error:
        yield Result("device", FAILURE, str(error), "see the hints above")
        return
    info = get_device_info(manager.device)
    memory = f"{info['total_memory'] / 2**30:.0f} GiB"
    found = f"{manager.device}: {info['name']}, {info['count']} of them, {memory}, best in {str(info['dtype'])[6:]}"
    yield Result("device", OK, found)

    from scripts.npu_setup.trials import run_trials

    yield from run_trials(manager)


def show(result: Result) -> None:
    print(f"{result.status:8} {result.name:24} {result.found}", flush=True)
    if result.status != OK and result.hint:
        print(f"{'':33} -> {result.hint}", flush=True)


def main() -> int:
    arguments = parse_arguments()
    results = []
    for result in run_checks(arguments.device):
        results.append(result)
        if not arguments.json:
            show(result)
    failed = any(result.status == FAILURE for result in results)
    if arguments.json:
        print(json.dumps({"ok": not failed, "checks": [asdict(result) for result in results]}, indent=2))
    else:
        print("Something is wrong: see the arrows above." if failed else "All that is needed is there.")
    if arguments.bundle:
        try:
            bundle.write(arguments.bundle, bundle.collect(results))
        except OSError as error:
            print(f"error: --bundle {arguments.bundle}: {error.strerror}", file=sys.stderr)
            return 2
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
