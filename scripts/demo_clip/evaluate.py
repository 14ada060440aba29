"""Score a CLIP on scenes that the demo CLIP has never seen: how often a picture finds its caption among others.

    python scripts/demo_clip/evaluate.py
    python scripts/demo_clip/evaluate.py --model clip_om --backend om

Among 4 to 64 captions of other scenes drawn at random, and among all captions that differ from the right one in a
word. Writes scores.json to --output_dir.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from PIL import Image

from runners.cli import ArgumentParser, file_path, non_negative_int, one_line_errors, positive_int
from runners.clip.service import BACKENDS, TORCH, CLIPInferenceService
from runners.files import make_output_dir
from runners.report import Report, format_table
from scripts.demo_clip.networks import variants
from scripts.demo_clip.train import DEMO_CLIP
from scripts.demo_model.scenes import Scene, held_out_scenes

CHOICES = (4, 16, 64)
BATCH = 64
VARIANTS = "one word differs"


def features(service: CLIPInferenceService, scenes: Sequence[Scene], seed: int) -> Tensor:
    """Of a picture of each scene, [count, width] on the CPU."""
    rng = random.Random(seed)
    pictures = [Image.fromarray(scene.render(rng)) for scene in scenes]
    starts = tqdm(range(0, len(pictures), BATCH), desc="pictures", unit="batch")
    return torch.cat([service.extract_image_features(pictures[start : start + BATCH]).cpu() for start in starts])


def share_among(similarity: Tensor, choices: int, seed: int) -> float:
    """How often the right caption, on the diagonal of [pictures, captions], is the most similar of `choices`."""
    rng = random.Random(seed)
    count = len(similarity)
    right = 0
    for number in range(count):
        others = rng.sample([other for other in range(count) if other != number], choices - 1)
        right += bool(similarity[number, number] > similarity[number, others].max())
    return right / count


def share_of_variants(service: CLIPInferenceService, scenes: Sequence[Scene], images: Tensor) -> float:
    """How often the right caption is more similar than each that differs in a word."""
    right = 0
    for scene, image in zip(tqdm(scenes, desc=VARIANTS, unit="scene"), images, strict=True):
        captions = [each.caption() for each in (scene, *chain(*variants(scene).values()))]
        texts = service.extract_text_features(captions).cpu()
        right += int((texts @ image).argmax() == 0)
    return right / len(scenes)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=str(DEMO_CLIP), metavar="DIR", help="(the demo CLIP)")
    add("--backend", choices=BACKENDS, default=TORCH, help="(torch)")
    add("--device", default="auto", metavar="NAME", help="npu, cuda or cpu, or one of several as npu:1 (auto)")
    add("--num_scenes", type=positive_int, default=1000, metavar="N", help="held-out scenes (1000)")
    add("--num_variants", type=non_negative_int, default=200, metavar="N", help=f"of them with '{VARIANTS}' (200)")
    add("--seed", type=non_negative_int, default=0, metavar="N", help="of scenes, pictures and choices (0)")
    add(
        "--output_dir",
        type=file_path,
        default=Path("outputs/evaluate_clip"),
        metavar="DIR",
        help="(outputs/evaluate_clip)",
    )
    args = parser.parse_args(arguments)
    if args.num_scenes < max(CHOICES):
        parser.error(f"--num_scenes must be {max(CHOICES)} or more, to choose among so many")
    return args


def run(args: argparse.Namespace) -> None:
    output_dir = make_output_dir(args.output_dir)
    service = CLIPInferenceService(args.model, args.device, backend=args.backend)
    scenes = held_out_scenes(args.num_scenes, args.seed)
    images = features(service, scenes, args.seed)
    similarity = images @ service.extract_text_features([scene.caption() for scene in scenes]).cpu().T
    shares = {f"among {choices}": share_among(similarity, choices, args.seed) for choices in CHOICES}
    if args.num_variants:
        chosen = scenes[: args.num_variants]
        shares[VARIANTS] = share_of_variants(service, chosen, images[: len(chosen)])
    report = Report()
    report.sections = {
        "settings": {**vars(args), "output_dir": str(output_dir), "device": service.device},
        "scores": shares,
    }
    report.write(output_dir / "scores.json")
    print(format_table(["right %"], [(name, [100 * share], ".1f") for name, share in shares.items()]))
    print(f"scores.json is in {output_dir}")


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        run(parse_arguments(arguments))


if __name__ == "__main__":
    main()
