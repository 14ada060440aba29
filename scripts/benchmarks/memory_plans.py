"""Compute in every way that the planner has, and compare its figures with the device's.

    python -m emulator run --soc Ascend310P3 -- python scripts/benchmarks/memory_plans.py --device npu --pixels 256
    python scripts/benchmarks/memory_plans.py --device cpu --model hidream --pixels 256

Of SD2.1-base at its true size a picture, of HiDream's transformer at a quarter of its width some steps. Weights are
random: a folder of 2.6 or 0.6 GB is written to a temporary place first. Each row is one mode of --memory: what the
plan says the device will hold at its peak, what its allocator counted, whether the result is the one of a resident
model, and the memory with which the plan says it runs. With --limits each is computed twice more, with 3 % more than
that and with 10 % less: the former has to run, the latter to fail.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ascend import DeviceManager, MemoryPlan, apply_plan, memory_cleanup, plan_memory
from ascend.planner import Request
from ascend.planner.activity import FROM_DISK
from processors import enable_fused_kernels
from runners.cli import ArgumentParser, image_size, one_line_errors, positive_int
from runners.hidream.model import fuse_hidream
from scripts.benchmarks.benchmark import SD21_BASE_UNET
from scripts.benchmarks.benchmark_parallel import SD21_TEXT, SD21_VAE
from tests.tiny_models import tiny_tokenizer

MODES = ("resident", "stream", "disk")
LIMITS = (1.03, 0.9)  # of what a plan says that it runs with
MIB = 2**20
HIDREAM_TEXT = [f"{part}{number}" for number in ("", "_2", "_3", "_4") for part in ("text_encoder", "tokenizer")]
# A quarter of the width, an eighth of the blocks.
SCALED_HIDREAM: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 128,
    "num_attention_heads": 5,
    "caption_channels": [1024, 1024],
    "text_emb_dim": 2048,
    "axes_dims_rope": (64, 32, 32),
    "max_resolution": (128, 128),
    "llama_layers": [0, 1, 2, 3, 4, 5],
}
HIDREAM_VAE: dict[str, Any] = {
    "block_out_channels": (32, 32, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 16,
}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="memory_plans.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", metavar="NAME", help="npu, cuda or cpu (the best there is)")
    parser.add_argument("--model", choices=tuple(SUBJECTS), default="sd2.1", help="(sd2.1)")
    parser.add_argument("--pixels", type=image_size, default=512, metavar="N", help="height and width (512)")
    parser.add_argument("--steps", type=positive_int, default=2, metavar="N", help="denoising steps (2)")
    parser.add_argument("--limits", action="store_true", help="draw with a little more and less memory than planned")
    args = parser.parse_args(arguments)
    if args.limits and args.device == "cpu":
        parser.error("--limits has no effect with --device cpu, whose memory torch does not limit")
    return args


def save_stable_diffusion(folder: Path, dtype: torch.dtype) -> None:
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


def draw(pipe: StableDiffusionPipeline, manager: DeviceManager, args: argparse.Namespace) -> torch.Tensor:
    """A picture `[1, 3, height, width]`."""
    images: torch.Tensor = pipe(
        "a lighthouse",
        height=args.pixels,
        width=args.pixels,
        num_inference_steps=args.steps,
        generator=manager.create_generator(0),
        output_type="pt",
    ).images
    return images


def save_hidream(folder: Path, dtype: torch.dtype) -> None:
    HiDreamImagePipeline(
        FlowMatchEulerDiscreteScheduler(),
        AutoencoderKL(**HIDREAM_VAE).to(dtype),
        **dict.fromkeys(HIDREAM_TEXT),
        transformer=HiDreamImageTransformer2DModel(**SCALED_HIDREAM).to(dtype),
    ).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "HiDreamTransformer"  # the pipeline would draw a megapixel whatever it is asked for
    (folder / "model_index.json").write_text(json.dumps(index))


@torch.no_grad()
def denoise(pipe: HiDreamImagePipeline, manager: DeviceManager, args: argparse.Namespace) -> torch.Tensor:
    """Latents `[2, 16, height / 8, width / 8]` after some steps of a transformer that has no text encoders here."""
    generator, size = manager.create_generator(0), args.pixels // 8

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(manager.device, manager.dtype)

    latents = random(2, 16, size, size)
    text = {
        "encoder_hidden_states_t5": random(2, 128, 1024),
        "encoder_hidden_states_llama3": random(len(SCALED_HIDREAM["llama_layers"]), 2, 128, 1024),
        "pooled_embeds": random(2, 2048),
    }
    for step in range(args.steps):
        timesteps = torch.full((2,), 999 - step, device=manager.device)
        latents = latents - pipe.transformer(latents, timesteps, **text, return_dict=False)[0] / args.steps
    return latents


class Subject(NamedTuple):
    """A model with random weights, written to a folder, and what is computed with it."""

    save: Callable[[Path, torch.dtype], None]
    pipeline: Any
    components: dict[str, None]  # that it does without
    compute: Callable[[Any, DeviceManager, argparse.Namespace], torch.Tensor]
    prepare: Callable[[torch.nn.Module], object] | None = None  # of its models, for the plan


SUBJECTS = {
    "sd2.1": Subject(save_stable_diffusion, StableDiffusionPipeline, {}, draw),
    "hidream": Subject(save_hidream, HiDreamImagePipeline, dict.fromkeys(HIDREAM_TEXT), denoise, fuse_hidream),
}


def compute(
    folder: Path, plan: MemoryPlan, manager: DeviceManager, args: argparse.Namespace
) -> tuple[int, torch.Tensor]:
    """Bytes as counted, 0 on the CPU, and what was computed."""
    subject = SUBJECTS[args.model]
    pipe = subject.pipeline.from_pretrained(folder, dtype=manager.dtype, **subject.components)
    if any(placement.where == FROM_DISK for placement in plan.placements):
        buffers = apply_plan(pipe, plan, manager.device, folder)
        enable_fused_kernels(pipe)  # after: stacked weights are in no file
    else:
        enable_fused_kernels(pipe)  # before: stacking leaves gaps in the device's memory
        buffers = apply_plan(pipe, plan, manager.device, folder)
    on_device = manager.device.type != "cpu"
    if on_device:
        manager.empty_cache()
        manager.reset_peak_memory()
    result = subject.compute(pipe, manager, args).cpu()
    counted = manager.memory_stats()["peak"] if on_device else 0
    pipe.remove_all_hooks()
    buffers.drop()
    del pipe
    memory_cleanup()  # hooks leave cycles, which would hold the weights until Python looks for them
    return counted, result


def runs_within(
    limit: float, folder: Path, plan: MemoryPlan, manager: DeviceManager, args: argparse.Namespace
) -> bool:
    """Whether `plan` runs where torch's allocator may take `limit` bytes."""
    module = torch.get_device_module(manager.device)
    module.set_per_process_memory_fraction(limit / manager.memory_stats()["total"])
    try:
        compute(folder, plan, manager, args)
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
        torch.manual_seed(0)
        SUBJECTS[args.model].save(folder, manager.dtype)
        resident = None
        rows = ["| | planned, MiB | counted, MiB | | result | runs with, MiB |" + " +3 % | -10 % |" * args.limits]
        rows.append("|---|---|---|---|---|---|" + "---|---|" * args.limits)
        for mode in MODES:
            request = Request(args.pixels, args.pixels)
            plan = plan_memory(
                folder,
                manager.device,
                request,
                manager.dtype,
                args.steps,
                mode,
                None,
                True,
                SUBJECTS[args.model].prepare,
            )
            print(plan.table(), end="\n\n", flush=True)
            counted, picture = compute(folder, plan, manager, args)
            resident = picture if resident is None else resident
            same = "the same" if torch.equal(picture, resident) else "another"
            share = f"{counted / MIB:,.0f} | {100 * (plan.peak / counted - 1):+.1f} %" if counted else "- | -"
            row = f"| `--memory {mode}` | {plan.peak / MIB:,.0f} | {share} | {same} "
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
