"""The command lines of HiDream-E1's runners."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from processors.step_cache import check_step_cache
from runners.cli import ArgumentParser, file_path, finite_float, non_negative_int, positive_int, text
from runners.devices import add_device_arguments
from runners.stable_diffusion.arguments import lora

DEMO_MODEL = "demo_model"
DEMO_IMAGE, DEMO_INSTRUCTION = "assets/shapes.png", "make the circle blue"
DEMO_DESCRIPTION = (
    "small yellow cross bottom left, small blue circle top right, large green cross bottom right, black background"
)
REFINER = "refiner"  # a transformer beside a model's components
REFINE_STRENGTH = 0.3  # of the original's scripts
GPT = "gpt-4o"  # which their instructions are refined by


@dataclass(frozen=True)
class Family:
    """What the original's scripts take for a model of HiDream-E1.

    Attributes:
        size_policy: of the pipeline.
        max_seq: tokens to which pictures that are not square are padded, whatever the configuration says; None leaves
            that.
        prompt: made of instruction and description.
    """

    name: str
    size_policy: str
    max_seq: int | None
    prompt: str
    negative_prompt: str
    guidance_scale: float
    image_guidance_scale: float


# inference_e1_1.py and inference.py of HiDream-ai/HiDream-E1
E1_1 = Family("HiDream-E1.1", "e1.1", 8192, "{instruction}", "low quality, blurry, distorted", 3.0, 1.5)
E1_FULL = Family(
    "HiDream-E1-Full",
    "e1-full",
    4608,
    "Editing Instruction: {instruction}. Target Image Description: {description}",
    "low resolution, blur",
    5.0,
    4.0,
)


def parse_arguments(
    program: str, description: str | None, family: Family, folder: Path, arguments: Sequence[str] | None
) -> argparse.Namespace:
    """Those of `program` in `folder`, beside its demo model."""
    parser = ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("what to edit").add_argument
    add(
        "--image",
        type=file_path,
        action="append",
        metavar="FILE",
        help="a picture, or a folder of pictures; repeat it",
    )
    add("--instruction", type=text, metavar="TEXT", help=f"what to change ({DEMO_INSTRUCTION}, of the demo's picture)")
    add("--target_description", type=text, metavar="TEXT", help="what the result shows; refining goes towards it")
    add("--edits", type=file_path, metavar="FILE", help=".jsonl with image, instruction, target_description, seed, id")
    add("--negative_prompt", type=text, metavar="TEXT", help=f"what results should not be ({family.negative_prompt})")
    add("--steps", type=positive_int, default=28, metavar="N", help="denoising steps (28)")
    add("--guidance_scale", type=finite_float, metavar="S", help=f"by the instruction ({family.guidance_scale})")
    add(
        "--image_guidance_scale",
        type=finite_float,
        metavar="S",
        help=f"by the picture ({family.image_guidance_scale})",
    )
    add(
        "--refine_strength",
        type=share,
        metavar="R",
        help=f"share of the steps that refine, 0 to 1 ({REFINE_STRENGTH})",
    )
    add("--refine", action=argparse.BooleanOptionalAction, help="--no-refine is --refine_strength 0")
    add(
        "--refine_instruction",
        nargs="?",
        const=GPT,
        type=text,
        metavar="MODEL",
        help=f"let a language model word instruction and description, see instruction_refinement.py ({GPT})",
    )
    add("--clip_cfg_norm", action=argparse.BooleanOptionalAction, default=True, help="limit what guidance adds (on)")
    add("--enlarge", action="store_true", help="scale pictures of less than a megapixel up, as the original does")
    add("--seed", type=non_negative_int, default=3, metavar="N", help="of each picture (3)")

    add = parser.add_argument_group("model").add_argument
    add("--model_path", type=file_path, default=folder / DEMO_MODEL, metavar="DIR", help="in diffusers' layout (demo)")
    add("--refiner_path", type=file_path, metavar="DIR", help=f"folder of a transformer ({REFINER} in --model_path)")
    add("--llama_path", type=file_path, metavar="DIR", help="Llama 3.1 8B Instruct, where the model has none")
    add(
        "--edit_lora",
        type=lora,
        metavar="FILE[:SCALE]",
        help="HiDream-E1-Full's adapter, which lets HiDream-I1-Full in --model_path edit; off while that refines",
    )
    add(
        "--lora",
        type=lora,
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="another adapter, in .safetensors, of what edits; repeat it for several (scale 1)",
    )
    add_device_arguments(parser)
    add(
        "--t5",
        choices=("auto", "device", "host"),
        default="auto",
        help="where T5 reads texts; auto: with the host where the chip clips what T5 needs float32 for, as 310P",
    )
    add = parser.add_argument_group("acceleration").add_argument
    add("--FA", action="store_true", help="fused attention and experts, see README")
    add("--dynamo", action="store_true", help="graphs: torchair on NPUs, inductor elsewhere")
    add(
        "--residual_dtype",
        choices=("float32",),
        help="of the sum that the transformers' blocks add to, where float16 is too narrow for it (the model's)",
    )
    add(
        "--step_cache",
        type=step_cache,
        metavar="NAME[:VALUE]",
        help="leave most blocks out in many steps: taylorseer:3 computes one step in 3 in full, first_block:0.08 "
        "those in which the first block's result changed by more than 8%%",
    )
    parser.add_argument_group("output").add_argument(
        "--output_dir", type=file_path, default=Path("outputs/hidream_e1"), metavar="DIR", help="(outputs/hidream_e1)"
    )
    args = parser.parse_args(arguments)
    if args.seed >= 2**63:
        parser.error(f"--seed must be below 2^63, not {args.seed}")
    if args.refine is not None and args.refine_strength is not None and args.refine != (args.refine_strength > 0):
        parser.error(
            f"--{'refine' if args.refine else 'no-refine'} contradicts --refine_strength {args.refine_strength:g}"
        )
    if args.refine_strength is None:
        args.refine_strength = 0.0 if args.refine is False else REFINE_STRENGTH
    is_demo = args.model_path == folder / DEMO_MODEL
    if args.edits and (args.image or args.instruction):
        parser.error("--edits names pictures and instructions: give either it, or --image and --instruction")
    if not args.edits and is_demo and not args.image:
        args.image = [folder / DEMO_IMAGE]
        if args.instruction is None:
            args.instruction, args.target_description = DEMO_INSTRUCTION, args.target_description or DEMO_DESCRIPTION
    if not args.edits and not (args.image and args.instruction and args.instruction.strip()):
        parser.error("--image and --instruction say what to edit; --instruction must not be empty")
    return args


def step_cache(argument: str) -> tuple[str, float]:
    """The name and value of `taylorseer`, `first_block:0.1` and the like."""
    name, has_value, value = argument.partition(":")
    try:
        return name, check_step_cache(name, finite_float(value) if has_value else None)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def share(argument: str) -> float:
    value = finite_float(argument)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, not {argument}")
    return value
