"""Count what one denoising step costs an NPU: launches, conversions, memory and an estimate of its time.

    python scripts/benchmarks/count_step.py                       the true configuration of SD2.1-base, 512 x 512
    python scripts/benchmarks/count_step.py --model demo          the demo model

Each configuration draws a picture of a few steps on the emulated chip, in a process of its own with a trace, and the
last full and the last shallow step of it are counted, with guidance and scheduler. "upstream" is diffusers as it was
before our patches. "AI CPU" counts the launches that are known to run there, which is slow. Without a graph, a launch
is a call of aclnn, whose own conversions and casts are not seen. Writes the traces, step.json and, where there are
graphs, drawings of them to --output_dir.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from emulator import EmulatorError, calibration, drawing, profile, report
from runners.cli import ArgumentParser, UserError, file_path, image_size, one_line_errors
from runners.files import make_output_dir, write_atomically, write_json
from scripts.fork.fork_wheel import ForkError, read_pin, unpack, upstream_wheel

CONFIGURATIONS: dict[str, tuple[str, ...]] = {
    "upstream": ("upstream",),
    "upstream, compiled": ("upstream", "dynamo"),
    "FA + TOME + DC": ("FA", "TOME", "DC"),
    "FA + TOME + DC + dynamo": ("FA", "TOME", "DC", "dynamo"),
}
COLUMNS = ("launches", "TransData", "Cast", "AI CPU", "waits", "GFLOP", "GB moved", "peak MiB", "estimated ms")
CALIBRATED = "calibrated ms"
Counts = dict[str, float | None]
INTERVAL = 2
STEPS = 2 * INTERVAL  # so that each kind of step comes once to compile and once to count


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="count_step.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--soc", choices=profile.names(), default="Ascend310P3", metavar="CHIP", help="(Ascend310P3)")
    add("--model", choices=("sd2.1-base", "demo"), default="sd2.1-base", metavar="NAME", help="or demo (sd2.1-base)")
    add("--configs", nargs="+", choices=CONFIGURATIONS, metavar="NAME", help=f"of {', '.join(CONFIGURATIONS)} (all)")
    add("--pixels", type=image_size, metavar="N", help="height and width (the model's)")
    add("--output_dir", type=file_path, default=Path("outputs/step"), metavar="DIR", help="(outputs/step)")
    add("--worker", metavar="NAME", help=argparse.SUPPRESS)  # the process that draws one configuration
    return parser.parse_args(arguments)


def measure(args: argparse.Namespace) -> dict[str, Counts]:
    """Draw with one configuration on the chip of this process, and count the last full and the last shallow step."""
    import torch

    from ascend.device import DeviceManager
    from runners.unet_cost import PROMPT_TOKENS
    from scripts.benchmarks.benchmark import make_pipeline

    flags = CONFIGURATIONS[args.worker]
    manager = DeviceManager("npu")
    npu = torch.get_device_module("npu")
    npu.set_task_queue_enable(0)  # so that the trace has a launch as soon as it is made
    model = {"demo": str(ROOT / "examples/sd2.1/demo_model")}.get(args.model, args.model)
    pipe: Any = make_pipeline(argparse.Namespace(model=model, seed=0), manager, torch.float16)
    accelerate(pipe, flags, args.output_dir / "graphs")

    trace = Path(os.environ["CANN_EMULATOR_TRACE"])
    marks, peaks = [0], [0.0]

    def mark(pipe: Any, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        marks.append(trace.stat().st_size)
        peaks.append(npu.max_memory_allocated() / 2**20)
        npu.reset_peak_memory_stats()
        return tensors

    width = pipe.unet.config.cross_attention_dim
    prompt = torch.randn(2, 1, PROMPT_TOKENS, width).to(manager.device, torch.float16)
    options = {"cache_interval": INTERVAL} if "DC" in flags else {}
    sizes = {"height": args.pixels, "width": args.pixels, "num_inference_steps": STEPS, "output_type": "latent"}
    pipe(prompt_embeds=prompt[0], negative_prompt_embeds=prompt[1], callback_on_step_end=mark, **sizes, **options)

    chip = profile.load(args.soc)
    kinds = {"full": STEPS - INTERVAL, "shallow": STEPS - 1} if "DC" in flags else {"full": STEPS - 1}
    return {
        kind: {**count(trace, marks[step], marks[step + 1], chip), "peak MiB": peaks[step + 1]}
        for kind, step in kinds.items()
    }


def accelerate(pipe: Any, flags: Sequence[str], graphs: Path) -> None:
    from ascend.graphs.compile import compile_pipeline
    from ascend.graphs.torchair import make_config, use_private_formats

    if "FA" in flags:
        from processors import enable_flash_attention

        enable_flash_attention(pipe)
    if "TOME" in flags:
        from processors import enable_token_merging

        enable_token_merging(pipe)
    if flags == ("upstream", "dynamo"):  # what one does without us: the same backend and formats
        import torchair

        config = make_config()
        config.post_grad_custom_pre_pass = None
        pipe.unet.requires_grad_(False)
        use_private_formats(pipe.unet)
        pipe.unet.compile(backend=torchair.get_npu_backend(compiler_config=config), fullgraph=True, dynamic=False)
    elif "dynamo" in flags:
        compile_pipeline(pipe, graphs)


def read_events(trace: Path, start: int, stop: int) -> list[dict[str, Any]]:
    """The lines of a trace between two positions in it, in bytes."""
    with trace.open("rb") as file:
        file.seek(start)
        return [json.loads(line) for line in file.read(stop - start).splitlines()]


def count(trace: Path, start: int, stop: int, chip: dict[str, Any]) -> Counts:
    events = read_events(trace, start, stop)
    launches = [event for event in events if event["event"] == "launch"]
    converted = sum(event["operator"] in report.FORMAT_CONVERSIONS for event in launches)
    cast = sum(event["operator"] == "Cast" for event in launches)
    is_graph = any("graph" in event for event in launches)
    return {
        "launches": len(launches),
        "TransData": converted if is_graph else None,
        "Cast": cast if is_graph else None,
        "AI CPU": sum(report.runs_on_ai_cpu(event, chip) for event in launches),
        "waits": sum(event["event"] == "sync" for event in events),
        "GFLOP": sum(event["flops"] for event in launches) / 1e9,
        "GB moved": sum(event["bytes"] for event in launches) / 1e9,
        "estimated ms": sum(report.estimate_seconds(event, chip) for event in launches) * 1e3,
    }


def draw(args: argparse.Namespace, name: str, upstream: Path) -> dict[str, Counts]:
    """Run one configuration in a process of its own, with the emulated chip."""
    trace, result = (args.output_dir / f"{file_stem(name)}.{suffix}" for suffix in ("jsonl", "json"))
    worker = [sys.executable, __file__, "--worker", name, "--soc", args.soc, "--model", args.model]
    worker += ["--output_dir", str(args.output_dir)] + (["--pixels", str(args.pixels)] if args.pixels else [])
    emulator = [sys.executable, "-m", "emulator", "run", "--soc", args.soc, "--trace", str(trace), "--"]
    environment = dict(os.environ)
    if "upstream" in CONFIGURATIONS[name]:
        environment["PYTHONPATH"] = os.pathsep.join([str(upstream), *filter(None, [environment.get("PYTHONPATH")])])
    print(f"{name} ...", flush=True)
    if subprocess.run([*emulator, *worker], cwd=ROOT, env=environment, check=False).returncode:
        raise UserError(f"{name}: the run failed, see above")
    return json.loads(result.read_text(encoding="utf-8"))


def draw_graphs(trace: Path, chip: dict[str, Any]) -> None:
    for name, found in drawing.graphs_that_ran(trace).items():
        svg = drawing.draw_svg(f"{trace.stem}, {name} on {chip['soc']}", drawing.make_rows(*found, chip))
        write_atomically(trace.with_name(f"{trace.stem}_{name}.svg"), svg.encode())


def file_stem(name: str) -> str:
    return name.replace(" + ", "_").replace(", ", "_")


def format_results(results: dict[str, dict[str, Counts]], soc: str, factor: calibration.Factor) -> str:
    """A table with the estimate by the nominal figures, and the calibrated one with its range."""
    columns = (*COLUMNS, CALIBRATED)
    lines = [f"| configuration | step | {' | '.join(columns)} |", f"|---|---|{'---:|' * len(columns)}"]
    for name, kinds in results.items():
        for kind, counts in kinds.items():
            calibrated = factor.estimate(counts["estimated ms"] or 0.0).text(digits=1)
            cells = [*(format_number(counts[column]) for column in COLUMNS), calibrated]
            lines.append(f"| {name} | {kind} | {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            f"times are an estimate for {soc} from its nominal speed and bandwidth, not a measurement;",
            f"{CALIBRATED}: {factor.label()}",
        ]
    )


def format_number(number: float | None) -> str:
    if number is None:  # not seen
        return "-"
    return f"{number:,.1f}" if isinstance(number, float) else str(number)


def run(args: argparse.Namespace) -> None:
    args.output_dir = make_output_dir(args.output_dir)
    if args.worker:
        write_json(args.output_dir / f"{file_stem(args.worker)}.json", measure(args))
        return
    try:
        factor = calibration.factor_of(profile.load(args.soc))
    except EmulatorError as error:
        raise UserError(str(error)) from error
    with tempfile.TemporaryDirectory() as folder:
        try:
            unpack(upstream_wheel(read_pin()), Path(folder))
        except ForkError as error:
            raise UserError(str(error)) from error
        results = {name: draw(args, name, Path(folder)) for name in args.configs or CONFIGURATIONS}
    for name in results:
        if "dynamo" in CONFIGURATIONS[name]:
            draw_graphs(args.output_dir / f"{file_stem(name)}.jsonl", profile.load(args.soc))
    write_json(args.output_dir / "step.json", results)
    print(format_results(results, args.soc, factor))


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        run(parse_arguments(arguments))


if __name__ == "__main__":
    main()
