"""Train the demo CLIP on the demo model's scenes: pictures of 64 x 64 pixels and their captions.

    python scripts/demo_clip/train.py

Every second scene of a batch differs from another in one word, so that the captions next to the right one are learned,
too. Stop it any time: the same command goes on from the last checkpoint, and ends at the weights an uninterrupted run
ends at. Writes the float16 folder that CLIPModel.from_pretrained and CLIPProcessor.from_pretrained load.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ascend.device import DeviceManager
from ascend.memory import keep_freed_memory
from runners.cli import ArgumentParser, file_path, non_negative_int, one_line_errors, positive_int
from runners.files import make_output_dir
from scripts.demo_clip.networks import build_clip, build_processor, read, training_scenes
from scripts.demo_model.scenes import held_out_scenes
from scripts.demo_model.training import fit

DEMO_CLIP = ROOT / "examples/clip/demo_model"
TOKENIZER = ROOT / "examples/sd2.1/demo_model/tokenizer"
LEARNING_RATE = 1e-3
PIXEL_NOISE = 0.2  # up to this standard deviation, of normalised pixels: what decoders leave of a plain colour
PREVIEW_SCENES = 256


def train(args: argparse.Namespace, device: torch.device, work_dir: Path) -> tuple[CLIPModel, CLIPProcessor]:
    tokenizer = CLIPTokenizer.from_pretrained(args.tokenizer)
    processor = build_processor(tokenizer)
    torch.manual_seed(args.seed)
    model = build_clip(tokenizer).to(device)
    test_scenes = held_out_scenes(PREVIEW_SCENES, args.seed)
    test_inputs = read(processor, [s.caption() for s in test_scenes], [s.render() for s in test_scenes])

    def loss(step: int) -> Tensor:
        rng = random.Random(f"{args.seed}/{step}")
        scenes = training_scenes(rng, args.batch)
        inputs = read(processor, [s.caption(rng) for s in scenes], [s.render(rng) for s in scenes])
        noise = np.random.default_rng(rng.getrandbits(63)).standard_normal(inputs["pixel_values"].shape, np.float32)
        inputs["pixel_values"] += PIXEL_NOISE * rng.random() * torch.from_numpy(noise)
        return model(**{name: value.to(device) for name, value in inputs.items()}, return_loss=True).loss

    @torch.no_grad()
    def preview(step: int) -> None:
        model.eval()
        logits = model(**{name: value.to(device) for name, value in test_inputs.items()}).logits_per_image
        right = (logits.argmax(dim=1).cpu() == torch.arange(PREVIEW_SCENES)).float().mean().item()
        tqdm.write(f"step {step}: {right:.1%} of pictures find their caption among {PREVIEW_SCENES} held-out ones")

    fit(model, loss, args.steps, LEARNING_RATE, work_dir / "clip.pt", args.save_every, preview)
    return model, processor


def export(model: CLIPModel, processor: CLIPProcessor, folder: Path) -> None:
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.to(torch.float16).save_pretrained(temporary)
    processor.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tokenizer", type=file_path, default=TOKENIZER, metavar="DIR", help="(the demo model's)")
    add("--output_dir", type=file_path, default=DEMO_CLIP, metavar="DIR", help="(examples/clip/demo_model)")
    add(
        "--work_dir",
        type=file_path,
        default=Path("outputs/demo_clip_training"),
        metavar="DIR",
        help="of the checkpoint (outputs/demo_clip_training)",
    )
    add("--device", metavar="NAME", help="npu, cuda or cpu, or one of several as npu:1 (the best there is)")
    add("--seed", type=non_negative_int, default=0, metavar="N", help="(0)")
    add("--steps", type=positive_int, default=1500, metavar="N", help="(1500)")
    add("--batch", type=positive_int, default=96, metavar="N", help="pictures in a step (96)")
    add("--save_every", type=positive_int, default=250, metavar="N", help="steps from checkpoint to checkpoint (250)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        args = parse_arguments(arguments)
        keep_freed_memory()
        device, work_dir = DeviceManager(args.device).device, make_output_dir(args.work_dir)
        export(*train(args, device, work_dir), make_output_dir(args.output_dir))


if __name__ == "__main__":
    main()
