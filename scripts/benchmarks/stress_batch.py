"""Kill generate_batch.py and its workers at random until all pictures are there, then check each of them.

    python scripts/benchmarks/stress_batch.py --model_path DIR

Draws the same prompts with run_sd.py in one process, and demands of the batch: all pictures are there, none twice, no
other file, and each equal to the one process's, pixel by pixel. A last run must find nothing left to draw. Needs the
environment of `setup_env.sh --batch`, and Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from runners.cli import ArgumentParser, UserError, file_path, non_negative_int, one_line_errors, positive_int

SD = ROOT / "examples" / "sd2.1"
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = ("in the centre", "at the top", "at the bottom", "on the left", "on the right")
MAX_RUNS = 100
Killer = random.Random


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="stress_batch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model_path", type=file_path, default=SD / "demo_model", metavar="DIR", help="(the demo model)")
    add("--num_prompts", type=positive_int, default=500, metavar="N", help="(500)")
    add("--steps", type=positive_int, default=4, metavar="N", help="(4)")
    add("--workers", type=positive_int, default=2, metavar="N", help="(2)")
    add("--driver_kills", type=non_negative_int, default=5, metavar="N", help="how often the whole run is killed (5)")
    add("--kill_seconds", type=positive_int, default=8, metavar="N", help="from one kill to the next, on average (8)")
    add("--seed", type=non_negative_int, default=0, metavar="N", help="of what is killed when (0)")
    add(
        "--output_dir",
        type=file_path,
        default=Path("outputs/stress_batch"),
        metavar="DIR",
        help="(outputs/stress_batch)",
    )
    return parser.parse_args(arguments)


def write_prompts(folder: Path, count: int) -> list[str]:
    """Write prompts.jsonl and, for run_sd.py, prompts.txt; picture N has seed N in both. The result is the ids."""
    prompts = [
        f"a {COLOURS[n % 8]} {SHAPES[n // 8 % 4]} {PLACES[n // 32 % 5]}, {COLOURS[(n + 3) % 8]} background"
        for n in range(count)
    ]
    rows = [{"id": f"picture-{n:05}", "prompt": prompt} for n, prompt in enumerate(prompts)]
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    return [row["id"] for row in rows]


def workers_of(driver: psutil.Process) -> Iterator[psutil.Process]:
    """The processes that draw, or load the model to do so."""
    for process in driver.children(recursive=True):
        try:
            if "MapWorker" in " ".join(process.cmdline()):
                yield process
        except psutil.Error:
            continue


def run_and_kill(
    command: Sequence[str | Path], log: Path, args: argparse.Namespace, chance: Killer, kills: Counter
) -> int:
    """Run the batch and kill some of it now and then. The result is its exit code, negative when it was killed."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        driver = psutil.Process(process.pid)
        while True:
            try:
                return process.wait(timeout=chance.expovariate(1 / args.kill_seconds))
            except subprocess.TimeoutExpired:
                pass
            if kills["driver"] < args.driver_kills and chance.random() < 0.4:
                process.kill()
                kills["driver"] += 1
                continue
            workers = list(workers_of(driver))
            if workers:
                chance.choice(workers).kill()
                kills["worker"] += 1


def check(images: Path, names: Sequence[str], reference: Path) -> list[str]:
    """What is wrong with the pictures in `images`."""
    expected = sorted(f"{name}.{kind}" for name in names for kind in ("json", "png"))
    found = sorted(path.name for path in images.iterdir() if path.name != ".lock")
    faults = [f"missing: {name}" for name in sorted(set(expected) - set(found))]
    faults += [f"not expected: {name}" for name in sorted(set(found) - set(expected))]
    singles = sorted(reference.glob("[0-9]*.png"), key=lambda path: int(path.name.partition("_")[0]))
    for number, (name, single) in enumerate(zip(names, singles, strict=True)):
        with Image.open(images / f"{name}.png") as ours, Image.open(single) as theirs:
            if not np.array_equal(np.asarray(ours), np.asarray(theirs)):
                faults.append(f"{name}.png differs from {single.name}")
            about = json.loads((images / f"{name}.json").read_text())
            texts = (ours.text["prompt"], ours.text["seed"])  # type: ignore[attr-defined]
            if not texts == (about["prompt"], str(about["seed"])) == (theirs.text["prompt"], str(number)):  # type: ignore[attr-defined]
                faults.append(f"{name} has the wrong prompt or seed")
    return faults


def run(args: argparse.Namespace) -> None:
    folder = args.output_dir.absolute()
    if folder.exists():
        raise UserError(f"--output_dir {folder} is there already; take another one")
    folder.mkdir(parents=True)
    names = write_prompts(folder, args.num_prompts)
    os.environ["OMP_NUM_THREADS"] = "1"  # as a worker has; another number can change a picture's last bits
    common = ["--model_path", args.model_path.absolute(), "--steps", str(args.steps), "--device", "cpu"]

    start = time.perf_counter()
    single = [sys.executable, SD / "run_sd.py", *common, "--prompt_file", folder / "prompts.txt"]
    with (folder / "single.log").open("wb") as output:
        subprocess.run([*single, "--output_dir", folder / "single"], check=True, stdout=output, stderr=output)
    print(f"one process drew {len(names)} pictures in {time.perf_counter() - start:.0f} s", flush=True)

    batch = [sys.executable, SD / "generate_batch.py", *common, "--prompts", folder / "prompts.jsonl"]
    batch += ["--output_dir", folder / "batch", "--workers", str(args.workers)]
    images, chance, kills, start = folder / "batch" / "images", Killer(args.seed), Counter[str](), time.perf_counter()
    for number in range(1, MAX_RUNS + 1):
        code = run_and_kill(batch, folder / "batch.log", args, chance, kills)
        count = len(list(images.glob("*.json")))
        print(f"run {number} ended with {code}: {count} pictures, so far {kills['worker']} workers killed", flush=True)
        if code == 0:
            break
    print(f"the batch took {time.perf_counter() - start:.0f} s; killed: {dict(kills)}")

    faults = check(images, names, folder / "single")
    times = {path: path.stat().st_mtime_ns for path in images.glob("picture-*")}
    subprocess.run(batch, check=True, stderr=subprocess.DEVNULL)
    if times != {path: path.stat().st_mtime_ns for path in images.glob("picture-*")}:
        faults.append("a run with nothing left to draw wrote pictures")
    print(*faults, sep="\n")
    if faults:
        raise SystemExit(1)
    print(f"all {len(names)} pictures are there, none twice, each equal to the one of a single process")


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        run(parse_arguments(arguments))


if __name__ == "__main__":
    main()
