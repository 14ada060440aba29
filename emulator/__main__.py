"""Run programs on emulated Ascend chips: the genuine torch_npu, on a machine that needs no NPU.

    python -m emulator run --soc Ascend310P3 -- python examples/sd2.1/run_sd.py --FA
    eval "$(python -m emulator env --soc Ascend910B3)"    the same for the rest of this shell
    python -m emulator run --trace trace.jsonl -- python x.py && python -m emulator report trace.jsonl

The first call installs torch_npu into a place of the emulator's own and compiles the emulated libraries.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from emulator import EmulatorError, build, drawing, profile, report, toolkit


def parse_arguments() -> argparse.Namespace:
    chip = argparse.ArgumentParser(add_help=False)
    chip.add_argument("--soc", default="Ascend310P3", help=f"the chip: {', '.join(profile.names())} (Ascend310P3)")
    chip.add_argument("--devices", type=int, default=1, metavar="N", help="how many chips the machine has (1)")
    chip.add_argument("--memory", type=profile.parse_size, metavar="SIZE", help="of each chip, as 24GiB (the chip's)")
    chip.add_argument("--trace", type=Path, metavar="FILE", help="write a JSON line for each launch, copy and wait")
    chip.add_argument(
        "--asynchronous", action="store_true", help="run streams on threads, so that a missing synchronisation shows"
    )
    chip.add_argument(
        "--check-races",
        action="store_true",
        help="report uses of memory that nothing orders; the exit code is then 66",
    )

    parser = argparse.ArgumentParser(
        prog="python -m emulator", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", parents=[chip], help="run a program: emulator run [options] -- python x.py")
    run.add_argument("program", nargs=argparse.REMAINDER, metavar="-- PROGRAM ...")
    commands.add_parser("env", parents=[chip], help='print shell exports: eval "$(python -m emulator env)"')
    commands.add_parser("build", help="build the libraries and print where they are")
    summary = commands.add_parser("report", help="summarise a trace, with an estimate of the chip's time")
    summary.add_argument("trace", type=Path)
    summary.add_argument("--soc", default="Ascend310P3", help="the chip to estimate the time of (Ascend310P3)")
    summary.add_argument("--graph", metavar="NAME", help="list the launches of this graph instead")
    summary.add_argument("--svg", type=Path, metavar="FILE", help="draw that graph (the one with the most launches)")
    return parser.parse_args()


def prepend(name: str, *values: Path) -> str:
    return os.pathsep.join([*map(str, values), *filter(None, [os.environ.get(name)])])


def environment(arguments: argparse.Namespace) -> dict[str, str]:
    """What a process needs to find an emulated chip."""
    if arguments.devices < 1:
        raise EmulatorError(f"--devices {arguments.devices}: there must be at least one")
    chip = profile.load(arguments.soc)
    built = build.build()
    variables = {
        **profile.environment(chip, arguments.devices, arguments.memory, profile.write_rules(chip, build.cache_dir())),
        **toolkit.environment(built / "toolkit"),
        "LD_LIBRARY_PATH": prepend("LD_LIBRARY_PATH", built / "lib"),
        "PATH": prepend("PATH", built / "toolkit" / "bin"),
        "PYTHONPATH": prepend("PYTHONPATH", build.torch_npu_site()),
        "CANN_EMULATOR_ASYNC": "1" if arguments.asynchronous else "0",
        "CANN_EMULATOR_CHECK_RACES": "1" if arguments.check_races else "0",
        "CANN_EMULATOR_TRACE": str(arguments.trace.resolve()) if arguments.trace else "",
    }
    if arguments.check_races:
        variables["TASK_QUEUE_ENABLE"] = "0"  # launches come from the lines of Python that ask for them
    return variables


def print_report(arguments: argparse.Namespace) -> None:
    chip = profile.load(arguments.soc)
    if arguments.graph is None:
        print(report.summarise(arguments.trace, chip))
    if arguments.graph is None and arguments.svg is None:
        return
    name, rows = drawing.rows_of(arguments.trace, arguments.graph, chip)
    if arguments.graph is not None:
        print(drawing.format_table(rows))
    if arguments.svg is not None:
        partial = arguments.svg.with_suffix(".partial")
        partial.write_text(drawing.draw_svg(f"{name} on {chip['soc']}", rows), encoding="utf-8")
        partial.replace(arguments.svg)


def run(arguments: argparse.Namespace) -> None:
    if arguments.command == "build":
        print(build.build())
    elif arguments.command == "report":
        print_report(arguments)
    elif arguments.command == "env":
        variables = environment(arguments)
        print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items()))
    else:
        program = arguments.program[1:] if arguments.program[:1] == ["--"] else arguments.program
        if not program:
            raise EmulatorError("nothing to run: write the program after --")
        variables = environment(arguments)
        if arguments.trace:
            arguments.trace.write_text("", encoding="utf-8")  # the processes append
        try:
            os.execvpe(program[0], program, {**os.environ, **variables})
        except FileNotFoundError:
            raise EmulatorError(f"{program[0]}: command not found") from None


def main() -> None:
    try:
        run(parse_arguments())
    except (EmulatorError, OSError) as error:
        sys.exit(f"emulator: {error}")


if __name__ == "__main__":
    main()
