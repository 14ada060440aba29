"""Draw with SD2.1-base at its true size in every way that the planner has, and compare its figures with the device's.

    python -m emulator run --soc Ascend310P3 -- python scripts/benchmarks/memory_plans.py --device npu --pixels 256

Weights are random: a folder of 2.6 GB is written to a temporary place first. Each row is one mode of --memory: what
the plan says the device will hold at its peak, what its allocator counted, whether the picture is the one of a
resident model, and the memory with which the plan says it runs. With --limits each is drawn twice more, with 3 % more
than that and with 10 % less: the former has to run, the latter to fail.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ascend import DeviceManager, MemoryPlan, apply_plan, memory_cleanup, plan_memory
from ascend.planner import Request
from processors import enable_fused_kernels
from runners.cli import ArgumentParser, image_size, one_line_errors, positive_int
from scripts.benchmarks.benchmark import SD21_BASE_UNET
from scripts.benchmarks.benchmark_parallel import SD21_TEXT, SD21_VAE
from tests.tiny_models import tiny_tokenizer

MODES = ("resident", "stream", "disk")
LIMITS = (1.03, 0.9)  # of what a plan says that it runs with
MIB = 2**20


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="memory_plans.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", metavar="NAME", help="npu or cuda (the best there is)")
    parser.add_argument("--pixels", type=image_size, default=512, metavar="N", help="height and width (512)")
    parser.add_argument("--steps", type=positive_int, default=2, metavar="N", help="denoising steps (2)")
    parser.add_argument("--limits", action="store_true", help="draw with a little more and less memory than planned")
    return parser.parse_args(arguments)


def save_model(folder: Path, dtype: torch.dtype) -> None:
    """SD2.1-base with random weights."""
    torch.manual_seed(0)
    StableDiffusionPipeline(
        vae=AutoencoderKL(**SD21_VAE).to(dtype),
        text_encoder=CLIPTextModel(CLIPTextConfig(**SD21_TEXT)).to(dtype),
        tokenizer=tiny_tokenizer(folder / "vocabulary"),
        unet=UNet2DConditionModel(**SD21_BASE_UNET).to(dtype),
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def draw(folder: Path, plan: MemoryPlan, manager: DeviceManager, args: argparse.Namespace) -> tuple[int, torch.Tensor]:
    """Bytes as counted, and the picture `[1, 3, height, width]`."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=manager.dtype)
    buffers = apply_plan(pipe, plan, manager.device, folder)
    enable_fused_kernels(pipe)
    manager.empty_cache()
    manager.reset_peak_memory()
    picture = pipe(
        "a lighthouse",
        height=args.pixels,
        width=args.pixels,
        num_inference_steps=args.steps,
        generator=manager.create_generator(0),
        output_type="pt",
    ).images.cpu()
    counted = manager.memory_stats()["peak"]
    pipe.remove_all_hooks()
    buffers.drop()
    del pipe
    memory_cleanup()  # hooks leave cycles, which would hold the weights until Python looks for them
    return counted, picture


def runs_within(
    limit: float, folder: Path, plan: MemoryPlan, manager: DeviceManager, args: argparse.Namespace
) -> bool:
    """Whether `plan` runs where torch's allocator may take `limit` bytes."""
    module = torch.get_device_module(manager.device)
    module.set_per_process_memory_fraction(limit / manager.memory_stats()["total"])
    try:
        draw(folder, plan, manager, args)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        module.set_per_process_memory_fraction(1.0)
        memory_cleanup()


def run(args: argparse.Namespace) -> None:
    manager = DeviceManager(args.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder, manager.dtype)
        resident = None
        rows = ["| | planned, MiB | counted, MiB | | picture | runs with, MiB |" + " +3 % | -10 % |" * args.limits]
        rows.append("|---|---|---|---|---|---|" + "---|---|" * args.limits)
        for mode in MODES:
            request = Request(args.pixels, args.pixels)
            plan = plan_memory(folder, manager.device, request, manager.dtype, args.steps, mode, fused_attention=True)
            print(plan.table(), end="\n\n", flush=True)
            counted, picture = draw(folder, plan, manager, args)
            resident = picture if resident is None else resident
            same = "the same" if torch.equal(picture, resident) else "another"
            share = f"{100 * (plan.peak / counted - 1):+.1f} %"
            row = f"| `--memory {mode}` | {plan.peak / MIB:,.0f} | {counted / MIB:,.0f} | {share} | {same} "
            row += f"| {plan.required / MIB:,.0f} |"
            for factor in LIMITS if args.limits else ():
                row += " runs |" if runs_within(factor * plan.required, folder, plan, manager, args) else " fails |"
            rows.append(row)
    print("\n".join(rows))


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        run(parse_arguments(arguments))


if __name__ == "__main__":
    main()
