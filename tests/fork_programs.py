"""Runs the programs that the only argument describes, each in a fork of this process: see `programs.run_forked`.

It is a program itself and knows nothing of this repository, so that those it runs have to find it themselves.
"""

import gc
import importlib
import json
import os
import runpy
import sys


def fork(line: list[str], variables: dict[str, str], output: str) -> int:
    """The exit code of the program, in the parent; the child does not return."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for stream, name in ((1, f"{output}.out"), (2, f"{output}.err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT, 0o600), stream)
    os.environ.update(variables)
    sys.argv = line
    runpy.run_path(line[0], run_name="__main__")
    sys.exit()


def main() -> None:
    imports, runs = json.loads(sys.argv[1])
    for name in imports:
        importlib.import_module(name)
    gc.freeze()  # or each child would look through all of it when it ends, which takes longer than most programs
    for run in runs:
        print(fork(*run), flush=True)


if __name__ == "__main__":
    main()
