"""Time and memory of a LoRA step of Stable Diffusion 2.1 in its true size, against diffusers' own training script.

    python scripts/benchmarks/training_step.py --upstream_script FILE

FILE is examples/text_to_image/train_text_to_image_lora.py of diffusers; it needs the packages datasets and
torchvision, which nothing here does. The model has random weights. Each round trains with that script and with ours,
one after the other, at the same settings, in processes of their own. A step's seconds are the difference between a
long and a short training, so that loading does not count, nor the encoding that ours does once and upstream's in each
step. The memory is the process's peak with all of that. Ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from runners.cli import ArgumentParser, UserError, file_path, image_size, one_line_errors, positive_int
from runners.files import make_output_dir
from runners.report import Report, format_table
from scripts.benchmarks.benchmark import SD21_BASE_UNET

PICTURES = 4
UPSTREAM = "upstream"
OURS = ("speed", "memory")
SHORT = 1  # steps


class Cost(NamedTuple):
    seconds: float
    peak: int  # bytes


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="training_step.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--upstream_script", type=file_path, required=True, metavar="FILE", help="train_text_to_image_lora.py")
    add("--resolution", type=image_size, default=512, metavar="PIXELS", help="(512)")
    add("--batch_size", type=positive_int, default=1, metavar="N", help="(1)")
    add("--lora_rank", type=positive_int, default=4, metavar="N", help="upstream's default (4)")
    add("--steps", type=positive_int, default=3, metavar="N", help="of the long trainings, beyond the short ones (3)")
    add("--rounds", type=positive_int, default=3, metavar="N", help="(3)")
    folder = Path("outputs/training_step")
    add("--output_dir", type=file_path, default=folder, metavar="DIR", help=f"also for the model, 5 GB ({folder})")
    return parser.parse_args(arguments)


def save_model(folder: Path) -> None:
    """A pipeline with the configuration of SD2.1-base and random weights; prompts are the demo model's tokens."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "examples/sd2.1/demo_model/tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=23,
            num_attention_heads=16,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=512,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    unet = UNet2DConditionModel(**SD21_BASE_UNET)
    pipe = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        pipe.save_pretrained(Path(scratch, "model"))
        Path(scratch, "model").replace(folder)


def save_pictures(folder: Path, size: int) -> None:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(PICTURES):
        pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append(f'{{"file_name": "{number}.png", "text": "a large red circle"}}\n')
    (folder / "metadata.jsonl").write_text("".join(rows))


def command(name: str, steps: int, args: argparse.Namespace, output: Path) -> list[str]:
    model, data = args.output_dir / "model", args.output_dir / "pictures"
    same = {"learning_rate": 1e-4, "seed": 0, "output_dir": output}
    if name == UPSTREAM:
        options = same | {
            "pretrained_model_name_or_path": model,
            "train_data_dir": data,
            "resolution": args.resolution,
            "train_batch_size": args.batch_size,
            "rank": args.lora_rank,
            "max_train_steps": steps,
            "mixed_precision": "no",
            "checkpointing_steps": 1000,
        }
        script = args.upstream_script
    else:
        options = same | {
            "model_path": model,
            "data": data,
            "cache_dir": output / "cache",
            "resolution": args.resolution,
            "batch_size": args.batch_size,
            "lora_rank": args.lora_rank,
            "steps": steps,
            "preset": name,
            "dtype": "float32",
            "caption_dropout": 0,
            "checkpoint_every": 1000,
            "device": "cpu",
        }
        script = ROOT / "examples/training/train_text_to_image.py"
    return [
        sys.executable,
        str(script),
        *(str(word) for key, value in options.items() for word in (f"--{key}", value)),
    ]


def measure(words: list[str]) -> Cost:
    """Raises UserError: the program failed; what it said last is in the message."""
    with tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            words, stdout=log, stderr=log, cwd=ROOT, env=os.environ | {"PYTHONPATH": python_path()}
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            log.seek(0)
            raise UserError(f"{words[1]} failed: {log.read().strip().splitlines()[-1]}")
    return Cost(seconds, usage.ru_maxrss * 1024)


def python_path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def run(args: argparse.Namespace) -> None:
    if not args.upstream_script.is_file():
        raise UserError(f"--upstream_script {args.upstream_script} does not exist: it is in diffusers' repository")
    args.output_dir = make_output_dir(args.output_dir).absolute()
    args.upstream_script = args.upstream_script.absolute()
    if not (args.output_dir / "model").exists():
        save_model(args.output_dir / "model")
    save_pictures(args.output_dir / "pictures", args.resolution)
    costs: dict[str, list[Cost]] = {name: [] for name in (UPSTREAM, *OURS)}
    for number in range(args.rounds):
        for name, found in costs.items():
            with tempfile.TemporaryDirectory(dir=args.output_dir) as output:
                short = measure(command(name, SHORT, args, Path(output, "short")))
                long = measure(command(name, SHORT + args.steps, args, Path(output, "long")))
            found.append(Cost((long.seconds - short.seconds) / args.steps, long.peak))
            print(
                f"round {number + 1}, {name}: {found[-1].seconds:.1f} s a step, {found[-1].peak / 2**30:.2f} GiB",
                flush=True,
            )
    report = Report()
    rows = []
    for name, found in costs.items():
        medians = [statistics.median(getattr(cost, what) for cost in found) for what in Cost._fields]
        speed = statistics.median(
            base.seconds / cost.seconds for base, cost in zip(costs[UPSTREAM], found, strict=True)
        )
        memory = statistics.median(cost.peak / base.peak for base, cost in zip(costs[UPSTREAM], found, strict=True))
        rows.append((name, [medians[0], medians[1] / 2**30, speed, memory], ".2f"))
        report.sections[name] = {"seconds": medians[0], "peak": medians[1], "speed": speed, "memory": memory}
    report.write(args.output_dir / "training_step.json")
    print(format_table(["s a step", "peak GiB", "speed, x upstream", "memory, x upstream"], rows))


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        run(parse_arguments(arguments))


if __name__ == "__main__":
    main()
