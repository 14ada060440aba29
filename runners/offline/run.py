"""The command line of convert_to_om.py."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ascend.atc import AtcError
from runners.cli import (
    FAILED,
    ArgumentParser,
    UserError,
    fail,
    file_path,
    image_size,
    one_line_errors,
    positive_int,
    text,
)
from runners.clip.arguments import MODEL
from runners.offline.converter import PROFILES, ModelConverter, convert_clip, convert_part, om_path
from runners.offline.export import OPSETS
from runners.offline.folder import CONFIG
from runners.offline.models import Export, text_encoder_export, vae_decoder_export


def parse_arguments(program: str, description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(title="what to convert", metavar="COMMAND")

    def add_command(name: str, what: str, action: Callable[[argparse.Namespace], None]) -> Callable[..., Any]:
        command = commands.add_parser(name, help=what, description=what)
        command.set_defaults(action=action)
        add = command.add_argument
        add(
            "--soc-version",
            metavar="CHIP",
            help="as Ascend310P3 or Ascend910B3, what `npu-smi info` shows with Ascend in front (this machine's)",
        )
        add("--precision-mode", metavar="MODE", help="of atc, whose default computes in float16 (force_fp16)")
        return add

    add = add_command("onnx", "an ONNX file to an offline model", convert_file)
    add("--model", type=file_path, required=True, metavar="FILE", help="the ONNX file")
    add("--output", type=file_path, required=True, metavar="FILE", help="of the offline model")
    add("--input-shape", metavar="SHAPES", help='"name:1,3,224,224;other:1,77", with -1 where profiles have values')
    add("--dynamic-dims", metavar="PROFILES", help='"1,1;2,2": of each profile a value for every -1 of all inputs')

    add = add_command("clip", "both towers of a CLIP or SigLIP, a file each", convert_clip_folder)
    add("--model", type=text, default=MODEL, metavar="DIR", help=f"a folder, or a name on the hub ({MODEL})")
    _add_export_arguments(add)
    add("--image-size", type=positive_int, metavar="PIXELS", help="to a side, to make sure (the model's)")
    add(
        "--text-length",
        type=positive_int,
        metavar="N",
        help="tokens that texts are cut at and padded to (the model's)",
    )
    add(
        "--dynamic-batch",
        action="store_true",
        help=f"profiles of {', '.join(map(str, PROFILES))} instead of one batch",
    )
    add("--aipp", action="store_true", help="the offline model takes bytes, and normalises them on the device")

    add = add_command("vae-decoder", "the VAE's decoder of a Stable Diffusion", convert_vae_decoder)
    _add_pipeline_arguments(add)
    add("--height", type=image_size, metavar="PIXELS", help="of the pictures (the model's)")
    add("--width", type=image_size, metavar="PIXELS", help="(the model's)")

    add = add_command("text-encoder", "the text encoder of a Stable Diffusion", convert_text_encoder)
    _add_pipeline_arguments(add)
    args = parser.parse_args(arguments)
    if not hasattr(args, "action"):
        parser.print_help()
        raise SystemExit(0)
    return args


def _add_export_arguments(add: Callable[..., Any]) -> None:
    add("--output-dir", type=file_path, required=True, metavar="DIR", help="of the files and model_config.json")
    add("--batch-size", type=positive_int, default=1, metavar="N", help="inputs in a call (1)")
    add("--opset", type=int, choices=OPSETS, default=OPSETS[0], help=f"of ONNX ({OPSETS[0]})")
    add("--onnx-only", action="store_true", help="stop before atc")


def _add_pipeline_arguments(add: Callable[..., Any]) -> None:
    add("--model", type=file_path, required=True, metavar="DIR", help="a pipeline's folder in diffusers' layout")
    _add_export_arguments(add)


def make_converter(args: argparse.Namespace) -> ModelConverter | None:
    """None for --onnx-only. What is missing is said here, before anything is done."""
    if not args.onnx_only:
        return ModelConverter(args.soc_version, args.precision_mode)
    unused = [name for name in ("soc_version", "precision_mode", "aipp") if getattr(args, name, None)]
    if unused:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise UserError(f"{flags}: for offline models, before which --onnx-only stops")
    return None


def convert_file(args: argparse.Namespace) -> None:
    converter = ModelConverter(args.soc_version, args.precision_mode)
    converter.convert_onnx_to_om(args.model, args.output, args.input_shape, args.dynamic_dims)
    print(om_path(args.output))


def convert_clip_folder(args: argparse.Namespace) -> None:
    convert_clip(
        make_converter(args),
        args.model,
        args.output_dir,
        args.batch_size,
        args.image_size,
        args.text_length,
        args.dynamic_batch,
        args.opset,
        args.aipp,
    )
    print(f"both towers and {CONFIG} are in {args.output_dir}")


def convert_vae_decoder(args: argparse.Namespace) -> None:
    _convert_one(args, lambda: vae_decoder_export(args.model, args.height, args.width))


def convert_text_encoder(args: argparse.Namespace) -> None:
    _convert_one(args, lambda: text_encoder_export(args.model))


def _convert_one(args: argparse.Namespace, load: Callable[[], Export]) -> None:
    name = convert_part(make_converter(args), args.model, load, args.output_dir, args.batch_size, args.opset)
    print(f"{name} and {CONFIG} are in {args.output_dir}")


def main(program: str, description: str | None, arguments: Sequence[str] | None = None) -> None:
    """Run the command line of `program`, which `description` describes."""
    with one_line_errors():
        args = parse_arguments(program, description, arguments)
        try:
            args.action(args)
        except AtcError as error:
            message, _, said = str(error).partition("\n")
            if said:
                print(said, file=sys.stderr)
            fail(message, FAILED)
