"""The picture that is changed, and the mask of what changes: --image, --mask and --strength."""

import argparse
from typing import Any

from diffusers import (
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

from runners.cli import UserError
from runners.images import read_picture

MULTIPLE = 8  # of a side, in pixels: the latents have an eighth of it


def pipeline_class(args: argparse.Namespace) -> type[DiffusionPipeline]:
    """What draws: text alone, with a picture, or within a mask."""
    if args.image is None:
        return StableDiffusionPipeline
    return StableDiffusionInpaintPipeline if args.mask else StableDiffusionImg2ImgPipeline


def read_inputs(args: argparse.Namespace) -> None:
    """Put the pictures themselves in the place of their paths, in the size that is drawn.

    Without --height and --width that is the picture's own, down to the next multiple of 8.

    Raises:
        UserError: there is no such file, or it is no picture.
    """
    args.picture = args.mask_picture = None
    if args.image is None:
        return
    picture = read_picture("--image", args.image)
    args.height = args.height or max(MULTIPLE, picture.height // MULTIPLE * MULTIPLE)
    args.width = args.width or max(MULTIPLE, picture.width // MULTIPLE * MULTIPLE)
    args.picture = resized(picture.convert("RGB"), args)
    if args.mask:
        args.mask_picture = resized(read_picture("--mask", args.mask).convert("L"), args)
        if args.mask_picture.getbbox() is None:
            raise UserError(f"--mask {args.mask} is all black: nothing would change")


def resized(picture: Image.Image, args: argparse.Namespace) -> Image.Image:
    size = args.width, args.height
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def call_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What a call of the pipeline takes of pictures and sizes."""
    size = {"height": args.height, "width": args.width}
    if args.picture is None:
        return size
    if args.mask_picture is None:
        return {"image": args.picture, "strength": args.strength}
    return {"image": args.picture, "mask_image": args.mask_picture, "strength": args.strength, **size}


def keep_the_rest(images: list[Image.Image], args: argparse.Namespace) -> list[Image.Image]:
    """`images` where the mask is white, and --image itself where it is black: decoding changes that a little."""
    if args.mask_picture is None:
        return images
    mask = args.mask_picture.point(lambda value: 255 * (value >= 128))  # as diffusers takes it
    return [Image.composite(image, args.picture, mask) for image in images]


def steps_drawn(args: argparse.Namespace) -> int:
    """Of --steps those that are taken: a picture that keeps something of --image skips the first ones."""
    return args.steps if args.image is None else min(int(args.steps * args.strength), args.steps)
