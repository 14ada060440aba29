"""The command line of pytorch_npu_inference.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from runners.cli import ArgumentParser, UserError, file_path, positive_int, text
from runners.clip.service import BACKENDS, TORCH
from runners.devices import DTYPES

MODEL = "openai/clip-vit-base-patch32"
TEXTS = ["a photo of a cat", "a photo of a dog"]
DEVICES = ("auto", "npu", "cuda", "cpu")


def parse_arguments(program: str, description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("what to look at").add_argument
    add("--image", type=file_path, nargs="+", metavar="PATH", help="pictures, or folders of pictures")
    add("--texts", type=text, nargs="+", default=TEXTS, metavar="TEXT", help="what they may show (a cat, a dog)")
    add("--input", type=file_path, metavar="FILE", help=".jsonl of rows with an image, and texts of their own or none")
    add_model_arguments(parser)
    add = parser.add_argument_group("output").add_argument
    add("--json", action="store_true", help="print a JSON object for each picture, one on each line")
    add("--output", type=file_path, metavar="FILE", help=".jsonl of the same")
    add("--benchmark", action="store_true", help="time 100 predictions of the first picture, too")
    args = parser.parse_args(arguments)
    if not args.image and not args.input:
        raise UserError("--image says which pictures to look at, or --input which rows")
    if any(not each.strip() for each in args.texts):
        raise UserError("--texts has an empty text")
    check_model_arguments(args)
    return args


def add_model_arguments(parser: ArgumentParser, batch_size: int = 4) -> None:
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        type=text,
        default=MODEL,
        metavar="DIR",
        help=f"CLIP or SigLIP: a folder, or a name on the hub ({MODEL}); examples/clip/demo_model needs no network",
    )
    add(
        "--backend",
        choices=BACKENDS,
        default=TORCH,
        help="onnx and om take a folder that convert_to_om.py wrote (torch)",
    )
    add("--device", default="auto", metavar="NAME", help=f"{', '.join(DEVICES)}, or one of several as npu:1 (auto)")
    add("--fp16", action="store_true", help="compute in float16 on an NPU or a GPU")
    add("--dtype", choices=DTYPES, help="in which to compute (float32)")
    add(
        "--batch-size",
        type=positive_int,
        default=batch_size,
        metavar="N",
        help=f"pictures in a forward ({batch_size})",
    )
    add("--FA", action="store_true", help="attend by the device's fused kernels")
    add("--dynamo", action="store_true", help="make graphs of the towers")


def check_model_arguments(args: argparse.Namespace) -> None:
    """Raise UserError for arguments that contradict each other."""
    if args.fp16 and args.dtype not in (None, "float16"):
        raise UserError(f"--fp16 and --dtype {args.dtype} name two precisions: give one")
    unused = [f"--{name}" for name in ("fp16", "dtype", "FA", "dynamo") if getattr(args, name)]
    if args.backend != TORCH and unused:
        raise UserError(f"{', '.join(unused)}: --backend {args.backend} computes as its files were converted")
