"""How much faster two devices draw a picture than one: SD2.1-base with random weights, guidance shared.

    python scripts/benchmark_parallel.py                    two processes of one thread each, on the CPU
    python scripts/benchmark_parallel.py --flags FA TOME DC --interval 2

One device and two draw in turns, each time in fresh processes; the speed-up is a ratio of neighbours, and its median
over the rounds is reported. Beside the denoising steps, after a first one that is not timed, it times the text encoder
and the VAE's decoder, for the share they have in a picture, and the decoder on half a picture, as tiles would give to
each device. From these it computes what more devices would do, and marks that as simulated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from benchmark import PROMPT_TOKENS, make_pipeline, switched_on
from diffusers import AutoencoderKL, StableDiffusionPipeline
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ascend.device import DeviceManager
from ascend.graph import compile_pipeline
from ascend.parallel import choose_branch_size, process_group, share_guidance, world_size
from examples.common.cli import ArgumentParser, fail, image_size, one_line_errors, positive_int
from examples.common.launch import RankFailedError, launch
from examples.common.report import format_table

FLAGS = ("FA", "TOME", "DC", "dynamo")
SD21_TEXT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "hidden_act": "gelu",
}
SD21_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
TILE_OVERLAP = 0.25  # of a tile, diffusers' own
PICTURE_STEPS = 50  # of the whole picture that the table speaks of
PROMPTS = 960  # of the batch in the table: as many for each of 2 to 16 devices
DEVICES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Stages:
    """Seconds of what makes up a picture: `step` of a denoising step, `tile` of the decoder on half a picture."""

    text: float
    step: float
    decoder: float
    tile: float

    def picture(self) -> float:
        return self.text + PICTURE_STEPS * self.step + self.decoder


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="benchmark_parallel.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cpu", metavar="NAME", help="npu, cuda or cpu (cpu)")
    add("--pixels", type=image_size, default=512, metavar="N", help="height and width (512)")
    add("--flags", nargs="*", choices=FLAGS, default=[], metavar="FLAG", help=f"accelerations of {' '.join(FLAGS)}")
    add("--interval", type=positive_int, default=2, metavar="N", help="of full steps with DC (2)")
    add("--ratio", type=float, default=0.5, metavar="R", help="of merged tokens with TOME (0.5)")
    add("--steps", type=positive_int, default=2, metavar="N", help="timed denoising steps (2)")
    add("--rounds", type=positive_int, default=3, metavar="N", help="(3)")
    add("--output", type=Path, help=argparse.SUPPRESS)  # of a rank: where its seconds go
    args = parser.parse_args(arguments)
    if "DC" in args.flags and args.steps % args.interval:
        parser.error(f"--steps {args.steps} must be a multiple of --interval {args.interval}, to time whole intervals")
    return args


def measure(args: argparse.Namespace) -> None:
    """What each rank does; rank 0 writes the seconds and the latents to `args.output`."""
    name = args.device if args.device == "cpu" else f"{args.device}:{os.environ.get('LOCAL_RANK', 0)}"
    manager = DeviceManager(name)
    pipe = make_pipeline(argparse.Namespace(model="sd2.1-base", seed=0), manager, manager.dtype)
    with process_group(manager.device, choose_branch_size(world_size(), has_guidance=True)) as mesh:
        with switched_on(pipe, args.flags, args) as options:
            if "dynamo" in args.flags:
                compile_pipeline(pipe)
            share_guidance(pipe, mesh)
            step, latents = denoise(pipe, args, manager, options)
        stages = Stages(step=step, **time_ends(args, manager))
        if mesh.rank == 0:
            args.output.write_text(json.dumps({"seconds": asdict(stages), "latents": latents.tolist()}))


def denoise(
    pipe: StableDiffusionPipeline, args: argparse.Namespace, manager: DeviceManager, options: dict[str, Any]
) -> tuple[float, torch.Tensor]:
    """Seconds of a step, on average over whole intervals of DeepCache, and the latents."""
    seconds = [0.0]

    def on_step_end(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if step in (0, args.steps):
            manager.synchronize()
            seconds.append(time.perf_counter())
        return tensors

    width = pipe.unet.config.cross_attention_dim
    prompt = torch.randn(2, 1, PROMPT_TOKENS, width, generator=torch.Generator().manual_seed(0)).to(pipe.unet.device)
    for _ in range(2 if "dynamo" in args.flags else 1):  # the first compiles
        latents = pipe(
            prompt_embeds=prompt[0].to(pipe.unet.dtype),
            negative_prompt_embeds=prompt[1].to(pipe.unet.dtype),
            height=args.pixels,
            width=args.pixels,
            num_inference_steps=args.steps + 1,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            callback_on_step_end=on_step_end,
            **options,
        ).images
    return (seconds[-1] - seconds[-2]) / args.steps, latents


@torch.no_grad()
def time_ends(args: argparse.Namespace, manager: DeviceManager) -> dict[str, float]:
    """Seconds of the text encoder for prompt and negative prompt, and of the decoder, in SD2.1's true size."""
    text_encoder = CLIPTextModel(CLIPTextConfig(**SD21_TEXT)).to(manager.device, manager.dtype)
    tokens = torch.zeros(2, PROMPT_TOKENS, dtype=torch.long, device=manager.device)
    vae = AutoencoderKL(**SD21_VAE).to(manager.device, manager.dtype)
    rows = args.pixels // 8
    text_encoder(tokens)  # the first call waits for memory
    half = round(rows / (2 - TILE_OVERLAP))  # two of them, overlapping by a share of their own
    picture = torch.zeros(1, 4, rows, rows, device=manager.device, dtype=manager.dtype)
    return {
        "text": seconds_of(manager, lambda: text_encoder(tokens)),
        "decoder": seconds_of(manager, lambda: vae.decode(picture)),
        "tile": seconds_of(manager, lambda: vae.decode(picture[:, :, :half])),
    }


def seconds_of(manager: DeviceManager, call: Callable[[], object]) -> float:
    manager.synchronize()
    start = time.perf_counter()
    call()
    manager.synchronize()
    return time.perf_counter() - start


def draw_in_turns(args: argparse.Namespace) -> dict[int, list[dict[str, Any]]]:
    """What rank 0 wrote in each round, for one device and for two."""
    results: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "result.json")
        for _ in tqdm(range(args.rounds), desc="rounds"):
            for devices, found in results.items():
                launch([*range(devices)], Path(folder), [__file__, *sys.argv[1:], "--output", str(output)])
                found.append(json.loads(output.read_text()))
    return results


def scaling_table(one: Stages, two: Stages) -> str:
    """Seconds of one picture and pictures in an hour: measured for up to two devices, computed for more.

    Devices draw pictures independently of each other, alone or in pairs, so that only the last, incomplete turn costs.
    """
    rows = []
    for devices in DEVICES:
        fastest = two if devices > 1 else one
        pairs, turns_alone = max(devices // 2, 1), -(-PROMPTS // devices)
        turns = -(-PROMPTS // pairs)
        hourly = [3600 * PROMPTS / (turns * fastest.picture()), 3600 * PROMPTS / (turns_alone * one.picture())]
        label = f"{devices} devices, simulated" if devices > 2 else f"{devices}, measured"
        rows.append((label, [fastest.picture(), *hourly], ".4g"))
    headings = ["a picture (s)", "an hour, in pairs", "an hour, each alone"]
    return f"{format_table(headings, rows)}\n(each alone: simulated from one device)"


def run(args: argparse.Namespace) -> None:
    if args.output:
        measure(args)
        return
    results = draw_in_turns(args)
    ones, twos = ([Stages(**result["seconds"]) for result in found] for found in results.values())
    one, two = (
        Stages(**{name: statistics.median(asdict(s)[name] for s in stages) for name in asdict(stages[0])})
        for stages in (ones, twos)
    )
    first, second = (torch.tensor(found[-1]["latents"]) for found in results.values())
    names = {"text": "text encoder", "step": "denoising step", "decoder": "decoder", "tile": "decoder, half a picture"}
    table = [(label, [asdict(one)[name], asdict(two)[name]], ".3f") for name, label in names.items()]
    print(format_table(["one device (s)", "two devices (s)"], table))
    ratios = {
        "denoising": [a.step / b.step for a, b in zip(ones, twos, strict=True)],
        f"picture of {PICTURE_STEPS} steps": [a.picture() / b.picture() for a, b in zip(ones, twos, strict=True)],
    }
    for name, rounds in ratios.items():
        each = ", ".join(f"{ratio:.2f}" for ratio in rounds)
        print(f"speed-up of two devices, {name}: {statistics.median(rounds):.2f}x (rounds: {each})")
    print(f"latents differ by {((first - second).norm() / first.norm()).item():.1e} of their norm\n")
    print(scaling_table(one, two))


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        try:
            run(parse_arguments(arguments))
        except RankFailedError as error:
            fail(error, error.exit_code)


if __name__ == "__main__":
    main()
