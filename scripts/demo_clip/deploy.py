"""A CLIP as checked and measured ONNX files and offline models (.om) for Ascend NPUs; deploy.sh calls it.

    bash examples/clip/deploy.sh
    bash examples/clip/deploy.sh --model openai/clip-vit-base-patch32 --output-dir clip_om --dynamic-batch

The environment is looked at, both towers are exported and, where CANN's atc is, converted; the files' answers are
compared with torch's in float32 by pictures of scenes; then all is measured. deploy_report.md and deploy_report.json
in the output folder say what came out. What fails ends it, with an exit code.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from PIL import Image

from runners.cli import UserError, one_line_errors
from runners.clip.deploy import deploy, parse_arguments
from runners.clip.gate import Pairs
from scripts.demo_clip.train import DEMO_CLIP
from scripts.demo_model.scenes import MAX_HELD_OUT, held_out_scenes


def scene_pairs(count: int) -> Pairs:
    """Pictures and captions of scenes that the demo CLIP was not trained with.

    Raises:
        UserError: there are fewer.
    """
    if count > MAX_HELD_OUT:
        raise UserError(f"--scenes {count}: there are {MAX_HELD_OUT}")
    scenes, rng = held_out_scenes(count, seed=0), random.Random(0)
    return Pairs([Image.fromarray(scene.render(rng)) for scene in scenes], [scene.caption() for scene in scenes])


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        args = parse_arguments("deploy.sh", __doc__, DEMO_CLIP, arguments)
        if args.model == str(DEMO_CLIP):
            print("the model is the demo CLIP, which knows shapes on plain backgrounds; --model takes another")
        deploy(args, scene_pairs(args.scenes))


if __name__ == "__main__":
    main()
