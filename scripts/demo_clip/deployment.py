"""deploy.sh's pictures: scenes that the demo CLIP was not trained with."""

from __future__ import annotations

import random
from collections.abc import Sequence

from PIL import Image

from runners.cli import UserError, one_line_errors
from runners.clip.deploy import deploy, parse_arguments
from runners.clip.gate import Pairs
from scripts.demo_clip.train import DEMO_CLIP
from scripts.demo_model.scenes import MAX_HELD_OUT, held_out_scenes


def scene_pairs(count: int) -> Pairs:
    """Pictures and captions of different scenes.

    Raises:
        UserError: there are fewer.
    """
    if count > MAX_HELD_OUT:
        raise UserError(f"--scenes {count}: there are {MAX_HELD_OUT}")
    scenes, rng = held_out_scenes(count, seed=0), random.Random(0)
    return Pairs([Image.fromarray(scene.render(rng)) for scene in scenes], [scene.caption() for scene in scenes])


def main(program: str, description: str | None, arguments: Sequence[str] | None = None) -> None:
    """Run the command line of `program`, which `description` describes."""
    with one_line_errors():
        args = parse_arguments(program, description, DEMO_CLIP, arguments)
        if args.model == str(DEMO_CLIP):
            print("the model is the demo CLIP, which knows shapes on plain backgrounds; --model takes another")
        deploy(args, scene_pairs(args.scenes))
