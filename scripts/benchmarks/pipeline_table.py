"""Try every acceleration on every Stable Diffusion pipeline, and print what came of it as README's table.

    python scripts/benchmarks/pipeline_table.py --device cpu
    python -m emulator run --soc Ascend310P3 --devices 2 -- python scripts/benchmarks/pipeline_table.py --device npu
    python -m emulator run --soc Ascend910B3 --devices 2 -- python scripts/benchmarks/pipeline_table.py --device npu

Each cell is the PSNR in dB of a picture with the acceleration against the one without, of a tiny random model in the
device's best dtype, "=" for the same picture, or the sentence that refuses. `dynamo` is against the same flags without
graphs. `two devices` is one picture on two processes against one. `LoRA` is a picture with an adapter and FA, DC and
dynamo, against the adapter without them. Any other error ends the program.

--results collects the devices: each run adds its own, and the table has a number of each in a cell.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ascend import DeviceManager, Mesh, ParallelError, compile_pipeline, process_group, share_guidance
from ascend.device import get_chip
from ascend.parallel import world_size
from processors import enable_fused_kernels, enable_token_merging
from runners.cli import ArgumentParser, file_path, one_line_errors
from runners.files import make_output_dir, write_json
from runners.images import similarity
from runners.launch import result_of_ranks
from tests.tiny_pipelines import PIPELINES, draw, make_pipeline

REFUSALS = (ValueError, TypeError, ParallelError)  # what our switches and diffusers say no with
STEPS = 6
ADAPTED = ["to_q", "to_k", "to_v", "to_out.0"]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="pipeline_table.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", metavar="NAME", help="npu, cuda or cpu (cpu)")
    parser.add_argument(
        "--results",
        type=file_path,
        default=Path("outputs/pipeline_table.json"),
        metavar="FILE",
        help="of all devices that were tried (outputs/pipeline_table.json)",
    )
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)  # of a rank: where its cells go
    return parser.parse_args(arguments)


class Trial:
    """One pipeline on one device, made anew for each cell."""

    def __init__(self, name: str, manager: DeviceManager, mesh: Mesh, folder: Path) -> None:
        self.name, self.manager, self.mesh, self.folder = name, manager, mesh, folder

    def make(self) -> Any:
        return make_pipeline(self.name).to(self.manager.device, self.manager.dtype, silence_dtype_warnings=True)

    def picture(self, pipe: Any, **kwargs: Any) -> Image.Image:
        return draw(pipe, self.name, num_inference_steps=STEPS, output_type="pil", **kwargs)[0]

    def fused(self) -> str:
        pipe = self.make()
        plain = self.picture(pipe)
        enable_fused_kernels(pipe)
        return against(self.picture(pipe), plain)

    def merged(self) -> str:
        pipe = self.make()
        plain = self.picture(pipe)
        enable_token_merging(pipe, max_downsample=2)
        return against(self.picture(pipe), plain)

    def cached(self) -> str:
        pipe = self.make()
        return against(self.picture(pipe, cache_interval=2), self.picture(pipe))

    def compiled(self) -> str:
        pipe = self.make()
        enable_fused_kernels(pipe)
        eager = self.picture(pipe, cache_interval=2)
        compile_pipeline(pipe, self.folder)
        return against(self.picture(pipe, cache_interval=2), eager)

    def shared(self) -> str:
        pipe = self.make()
        alone = self.picture(pipe)
        share_guidance(pipe, self.mesh)
        return against(self.picture(pipe), alone)

    def adapted(self) -> str:
        from peft import LoraConfig

        pipe = self.make()
        # With random weights, not with those that change nothing.
        pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=ADAPTED, init_lora_weights=False))
        plain = self.picture(pipe)
        enable_fused_kernels(pipe)
        compile_pipeline(pipe, self.folder)
        return against(self.picture(pipe, cache_interval=2), plain)


COLUMNS: dict[str, Callable[[Trial], str]] = {
    "FA": Trial.fused,
    "TOME": Trial.merged,
    "DC": Trial.cached,
    "dynamo": Trial.compiled,
    "LoRA": Trial.adapted,
    "two devices": Trial.shared,
}
ON_TWO = ("two devices",)


def against(picture: Image.Image, expected: Image.Image) -> str:
    psnr = similarity(picture, expected).psnr
    return "=" if psnr is None else f"{psnr:.0f}"


def cell(trial: Trial, column: str) -> str:
    try:
        torch.manual_seed(0)
        return COLUMNS[column](trial)
    except REFUSALS as error:
        return f"refused: {error}"


def measure(args: argparse.Namespace) -> None:
    """The cells of one device, or those of two where there are two ranks; rank 0 writes them to `args.output`."""
    name = args.device if args.device == "cpu" else f"{args.device}:{os.environ['LOCAL_RANK']}"
    manager = DeviceManager(name)
    columns = [column for column in COLUMNS if (column in ON_TWO) == (world_size() > 1)]
    cells: dict[str, dict[str, str]] = {}
    with process_group(manager.device, branch_size=world_size()) as mesh, tempfile.TemporaryDirectory() as folder:
        for pipeline in tqdm(PIPELINES, desc=", ".join(columns), disable=mesh.rank > 0):
            trial = Trial(pipeline, manager, mesh, Path(folder))
            cells[pipeline] = {column: cell(trial, column) for column in columns}
        if mesh.rank == 0:
            device = get_chip(manager.device) or manager.device.type.upper()
            dtype = str(manager.dtype).removeprefix("torch.")
            args.output.write_text(json.dumps({"device": device, "dtype": dtype, "cells": cells}))


def markdown(results: dict[str, dict[str, dict[str, str]]]) -> str:
    """The cells of each device, pipeline and column as a table; refusals are its footnotes."""
    refusals: dict[str, str] = {}

    def short(cell: str) -> str:
        return refusals.setdefault(cell, f"[{len(refusals) + 1}]") if cell.startswith("refused") else cell

    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name in PIPELINES:
        cells = [" / ".join(short(device[name][column]) for device in results.values()) for column in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([f"{' / '.join(results)}:\n", *lines, *(f"\n{mark} {why}" for why, mark in refusals.items())])


def run(args: argparse.Namespace, arguments: Sequence[str]) -> None:
    if args.output:
        diffusers.logging.set_verbosity_error()  # it warns of dtypes for every model that is cast
        measure(args)
        return
    alone, shared = (result_of_ranks(devices, [__file__, *arguments]) for devices in ([0], [0, 1]))
    cells = {name: row | shared["cells"][name] for name, row in alone["cells"].items()}
    results = json.loads(args.results.read_text()) if args.results.exists() else {}
    results[f"{alone['device']} in {alone['dtype']}"] = cells
    make_output_dir(args.results.parent)
    write_json(args.results, results)
    print(markdown(results))


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        run(parse_arguments(arguments), sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    main()
