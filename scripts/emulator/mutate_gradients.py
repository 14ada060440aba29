"""Whether the tests notice a wrong sign, in any tensor that a backward operator of the emulator writes.

    python scripts/emulator/mutate_gradients.py [--soc Ascend910B3] [--only 'FlashAttention*']

A copy of the emulator gets a switch that negates one tensor of one operator. The tests of TESTS run once to see which
operators each of them reaches, and then those that reach an operator run again for each tensor that it writes, until
one fails. What no test reaches counts as unnoticed.

Exit codes: 0 every wrong sign is noticed, 1 some are not or the tests fail as they are, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
TESTS = [f"tests/on_npu/test_{name}.py" for name in ("gradients", "attention_gradients", "losses")]
BACKWARD = re.compile(r"^aclnn(\w*(?:Backward|Grad)(?:V\d)?)$")
# torch_npu asks whether they exist, and calls their successor.
SUPERSEDED = {"HardswishBackward"}
# Outputs that the operators leave as they are, in which the emulator puts NaN: a test asks for that, not for a sign.
LEFT_OUT = {"dpse"}
ANCHOR = "        executor.run();\n"
SWITCH = """
        for (const Argument& argument : executor.call.arguments) {
            const std::string name = std::string(executor.call.operator_name) + " " + argument.name;
            if (!argument.written) continue;
            if (const char* log = std::getenv("CANN_MUTATION_LOG")) std::ofstream(log, std::ios::app) << name << '\\n';
            const char* mutant = std::getenv("CANN_MUTANT");
            if (mutant == nullptr || name != mutant) continue;
            for (const auto& tensor : argument.tensors) tensor->read().neg_();
        }
"""


class Mutations:
    """Runs the collected tests in its own order, once as they are and then against each wrong sign."""

    def __init__(self, log: Path, declared: set[str]) -> None:
        self.log, self.declared = log, declared
        self.unnoticed: list[str] = []
        self.failed: list[str] = []
        self.noticed = 0

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        reaching: dict[str, dict[str, pytest.Item]] = defaultdict(dict)
        for item in tqdm(session.items, desc="as they are", unit="test"):
            self.log.write_text("")
            if not passes(item):
                self.failed.append(item.nodeid)
            for written in self.log.read_text().splitlines():
                reaching[written][item.nodeid] = item
        os.environ.pop("CANN_MUTATION_LOG")
        reached = {written.split()[0] for written in reaching}
        self.unnoticed = [f"{name}: no test reaches it" for name in sorted(self.declared - reached)]
        pairs = [written.split() for written in reaching]
        wanted = [f"{name} {out}" for name, out in pairs if name in self.declared and out not in LEFT_OUT]
        for written in tqdm(sorted(wanted), desc="wrong signs", unit="tensor"):
            os.environ["CANN_MUTANT"] = written
            if all(passes(item) for item in reaching[written].values()):
                self.unnoticed.append(f"{written}: {len(reaching[written])} tests pass")
            else:
                self.noticed += 1
        os.environ.pop("CANN_MUTANT", None)
        return True


def passes(item: pytest.Item) -> bool:
    if hasattr(item, "_initrequest"):
        item._initrequest()  # as pytest-rerunfailures does, so that a test runs once more
    return all(report.outcome != "failed" for report in runtestprotocol(item, log=False, nextitem=None))


def declared_operators(library: Path) -> set[str]:
    listed = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    names = (BACKWARD.match(line.split()[-1]) for line in listed.splitlines())
    return {name[1] for name in names if name} - SUPERSEDED


def run_tests(library: Path, only: str) -> int:
    """Within the emulator: collects and runs the tests."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        os.environ["CANN_MUTATION_LOG"] = str(log)
        declared = {name for name in declared_operators(library) if fnmatchcase(name, only)}
        mutations = Mutations(log, declared)
        pytest.main(["--quiet", "--no-header", "-p", "no:cacheprovider", *TESTS], plugins=[mutations])
    for test in mutations.failed:
        print(f"fails without any wrong sign: {test}")
    for line in mutations.unnoticed:
        print(f"not noticed: {line}")
    print(f"{mutations.noticed} wrong signs of {len(declared)} operators noticed, {len(mutations.unnoticed)} not")
    return 1 if mutations.unnoticed or mutations.failed else 0


def run_in_copy(soc: str, only: str) -> int:
    """Runs this program once more, in a copy of the emulator that has the switch."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "emulator"
        shutil.copytree(ROOT / "emulator", copy, ignore=shutil.ignore_patterns("__pycache__"))
        launch = copy / "src/runtime/launch.cpp"
        text = launch.read_text()
        if text.count(ANCHOR) != 1:
            sys.exit(f"mutate_gradients.py: {launch} has {text.count(ANCHOR)} places for the switch, not one")
        headers = "#include <cstdlib>\n#include <fstream>\n"
        launch.write_text(headers + text.replace(ANCHOR, ANCHOR + SWITCH))
        library = subprocess.run(
            [sys.executable, "-m", "emulator", "build"], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.strip()
        inside = [sys.executable, __file__, "--library", f"{library}/lib/libcann_emulator.so", "--only", only]
        run = [sys.executable, "-m", "emulator", "run", "--soc", soc, "--", "env", "-C", str(ROOT), *inside]
        try:
            return subprocess.run(run, cwd=folder, env={**os.environ, "TASK_QUEUE_ENABLE": "0"}).returncode
        finally:
            shutil.rmtree(library)  # from the cache, where nobody would look for it again


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--soc", default="Ascend910B3", help="the chip (Ascend910B3)")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="operators whose names fit, as 'Layer*'")
    parser.add_argument("--library", type=Path, help=argparse.SUPPRESS)  # in the copy: what declares the operators
    arguments = parser.parse_args()
    if arguments.library is None:
        return run_in_copy(arguments.soc, arguments.only)
    return run_tests(arguments.library, arguments.only)


if __name__ == "__main__":
    sys.exit(main())
