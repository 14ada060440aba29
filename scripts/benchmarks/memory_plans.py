"""Draw with SD2.1-base at its true size in every way that the planner has, and compare its figures with the device's.

    python -m emulator run --soc Ascend310P3 -- python scripts/benchmarks/memory_plans.py --device npu --pixels 256

Weights are random: a folder of 2.6 GB is written to a temporary place first. Each row is one mode of --memory: what
the plan says the device will hold at its peak, what its allocator counted, and whether the picture is the one of a
resident model.
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

from ascend import DeviceManager, apply_plan, memory_cleanup, plan_memory
from ascend.planner import Request
from processors import enable_fused_kernels
from runners.cli import ArgumentParser, image_size, one_line_errors, positive_int
from scripts.benchmarks.benchmark import SD21_BASE_UNET
from scripts.benchmarks.benchmark_parallel import SD21_TEXT, SD21_VAE
from tests.tiny_models import tiny_tokenizer

MODES = ("resident", "stream", "disk")
MIB = 2**20


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="memory_plans.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", metavar="NAME", help="npu or cuda (the best there is)")
    parser.add_argument("--pixels", type=image_size, default=512, metavar="N", help="height and width (512)")
    parser.add_argument("--steps", type=positive_int, default=2, metavar="N", help="denoising steps (2)")
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


def draw(folder: Path, mode: str, manager: DeviceManager, args: argparse.Namespace) -> tuple[int, int, torch.Tensor]:
    """Bytes as planned and as counted, and the picture `[1, 3, height, width]`."""
    request = Request(args.pixels, args.pixels)
    plan = plan_memory(folder, manager.device, request, manager.dtype, args.steps, mode, fused_attention=True)
    print(plan.table(), end="\n\n", flush=True)
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
    return plan.peak, counted, picture


def run(args: argparse.Namespace) -> None:
    manager = DeviceManager(args.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder, manager.dtype)
        rows = {mode: draw(folder, mode, manager, args) for mode in MODES}
    resident = rows["resident"][2]
    print("| | planned, MiB | counted, MiB | | picture |\n|---|---|---|---|---|")
    for mode, (planned, counted, picture) in rows.items():
        same = "the same" if torch.equal(picture, resident) else "another"
        share = f"{100 * (planned / counted - 1):+.1f} %"
        print(f"| `--memory {mode}` | {planned / MIB:,.0f} | {counted / MIB:,.0f} | {share} | {same} |")


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        run(parse_arguments(arguments))


if __name__ == "__main__":
    main()
