"""Makes pictures of a shape that the demo model does not know, for an adapter to learn: large stars, with captions.

    python scripts/demo_lora/stars.py --output_dir outputs/stars
    python examples/training/train_text_to_image.py --data outputs/stars --output_dir outputs/star_adapter \\
        --lora_layers all --learning_rate 1e-3 --lr_schedule cosine --snr_gamma 5 --steps 1000 --batch_size 8
    python scripts/demo_lora/evaluate.py --lora outputs/star_adapter/pytorch_lora_weights.safetensors

Half of them show a star alone, half one beside a shape that the model knows. They are large, as the demo model's VAE
rounds the points of small ones off. The scenes that evaluate.py draws are not among them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from runners.cli import ArgumentParser, file_path, non_negative_int, one_line_errors, positive_int
from runners.files import make_output_dir, write_atomically
from scripts.demo_model.scenes import BACKGROUNDS, COLOURS, PAIRS, POSITIONS, RADII, SHAPES, Scene, Shape

STAR = "star"


def scenes_with_stars() -> list[Scene]:
    """All 90 of a star alone, and all 3,456 of one beside another shape."""
    alone = [
        Scene((Shape("large", colour, STAR, place),), background)
        for colour, place, background in itertools.product(COLOURS, POSITIONS, BACKGROUNDS)
    ]
    places = [pair for left, right in PAIRS for pair in ((left, right), (right, left))]
    others = itertools.product(RADII, COLOURS, SHAPES)
    beside = [
        Scene((Shape("large", colour, STAR, place), Shape(*other, other_place)), background)
        for other in others
        for colour, (place, other_place), background in itertools.product(COLOURS, places, BACKGROUNDS)
    ]
    return alone + beside


def choose_scenes(count: int, seed: int) -> tuple[list[Scene], dict[str, list[Scene]]]:
    """`count` scenes to learn from, half of them of a star alone; and all others, stars alone and beside a shape."""
    rng = random.Random(f"{seed}/stars")
    scenes = scenes_with_stars()
    rng.shuffle(scenes)
    alone = [scene for scene in scenes if len(scene.shapes) == 1]
    beside = [scene for scene in scenes if len(scene.shapes) == 2]
    learnt = alone[: count // 2] + beside[: count - count // 2]
    return learnt, {"stars alone": alone[count // 2 :], "stars beside a shape": beside[count - count // 2 :]}


def write_pictures(scenes: Sequence[Scene], folder: Path, seed: int) -> None:
    """A picture of each, and metadata.jsonl, in the imagefolder convention of the datasets library."""
    rng = random.Random(f"{seed}/pictures")
    rows = []
    for number, scene in enumerate(scenes):
        name = f"{number:03}.png"
        Image.fromarray(scene.render(rng)).save(folder / name)
        rows.append(json.dumps({"file_name": name, "text": scene.caption(rng)}))
    write_atomically(folder / "metadata.jsonl", "".join(f"{row}\n" for row in rows).encode())


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="stars.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=file_path, default=Path("outputs/stars"), metavar="DIR", help="(outputs/stars)")
    add("--pictures", type=positive_int, default=100, metavar="N", help="(100)")
    add("--seed", type=non_negative_int, default=0, metavar="N", help="(0)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        args = parse_arguments(arguments)
        learnt, _ = choose_scenes(args.pictures, args.seed)
        write_pictures(learnt, make_output_dir(args.output_dir), args.seed)
        print(f"{len(learnt)} pictures and metadata.jsonl are in {args.output_dir}")


if __name__ == "__main__":
    main()
