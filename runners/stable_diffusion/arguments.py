"""The command lines of run_sd.py and generate_batch.py, as far as they are the same, and run_sd.py's own."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from ascend.sizes import byte_size
from processors.kernels.select import check_kernels, kernel_names
from processors.merging.processor import check_ratio
from runners.cache_options import BETWEEN, DEFAULT_INTERVAL, FAST, MODERATE_GUIDANCE, cache_interval, cache_schedule
from runners.cli import (
    ArgumentParser,
    UserError,
    file_path,
    finite_float,
    image_size,
    non_negative_int,
    positive_int,
    read_prompts,
    text,
)
from runners.devices import add_device_arguments
from runners.model_dir import DEFAULTS, GUIDANCE_SCALE, guidance_scale_of
from runners.schedule_file import FILE_NAME
from runners.schedulers import SCHEDULERS
from runners.stable_diffusion.adapters import Lora
from runners.stable_diffusion.fast import choose_cache

# In the folder of the runners:
DEMO_MODEL = "demo_model"
DEMO_PROMPTS = "prompts.txt"
MAX_SEED = 2**63 - 1
STRENGTH, STRENGTH_IN_MASK = 0.8, 1.0  # diffusers' own defaults


def parse_arguments(description: str | None, folder: Path, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Those of run_sd.py in `folder`, with `prompts`, `guidance_scale` and `cache` chosen."""
    parser = ArgumentParser(
        prog="run_sd.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("what to draw").add_argument
    add_model_argument(add, folder / DEMO_MODEL)
    add("--prompt", type=text, action="append", default=[], metavar="TEXT", help="repeat it for more pictures")
    add("--prompt_file", type=file_path, metavar="FILE", help="UTF-8 text, a prompt on each line")
    add("--negative_prompt", type=text, default="", metavar="TEXT", help="what the pictures should not show")
    add_step_and_size_arguments(add)
    add("--image", type=file_path, metavar="FILE", help="change this picture instead of drawing from noise")
    add("--mask", type=file_path, metavar="FILE", help="of --image only what is white here; the rest stays")
    add("--strength", type=strength, metavar="S", help="how much of --image goes, up to 1 (0.8, with --mask 1)")
    add_lora_argument(add)
    add("--num_images", type=positive_int, default=1, metavar="N", help="pictures of each prompt, made together (1)")
    add("--seed", type=non_negative_int, default=0, metavar="N", help="of the first picture, the next has N+1 ... (0)")

    add_device_arguments(parser)
    parser.add_argument_group("several devices").add_argument(
        "--cfg_parallel",
        type=int,
        choices=(1, 2),
        metavar="N",
        help="devices that share a picture, one for each branch of guidance (2 where torchrun starts several)",
    )
    add_acceleration_arguments(parser)

    add = parser.add_argument_group("output").add_argument
    add("--warmup", type=non_negative_int, metavar="N", help="untimed calls first (1 with --dynamo, else 0)")
    add("--output_dir", type=file_path, default=Path("outputs/sd2.1"), metavar="DIR", help="(outputs/sd2.1)")
    add("--compare", action="store_true", help="also draw without accelerations and compare")
    add(
        "--clip_model",
        type=text,
        metavar="DIR",
        help="of --compare: a CLIP that scores how pictures fit their prompts",
    )
    add("--explain", action="store_true", help="say why --FA takes the kernel that it takes; report.json has it too")

    args = parser.parse_args(arguments)
    args.prompts = choose_prompts(args, folder)
    if not args.image:
        for name in ("mask", "strength"):
            if getattr(args, name) is not None:
                parser.error(f"--{name} has no effect without --image, which it is about")
    elif args.strength is None:
        args.strength = STRENGTH_IN_MASK if args.mask else STRENGTH
    complete(args)
    if args.seed + len(args.prompts) * args.num_images > MAX_SEED:
        parser.error(f"--seed {args.seed} is too large: seeds end at {MAX_SEED}")
    if args.compare and not (args.FA or args.TOME or args.cache or args.dynamo):
        parser.error("--compare needs an acceleration to compare: --FA, --TOME, --DC, --fast or --dynamo")
    if args.clip_model and not args.compare:
        parser.error("--clip_model has no effect without --compare, whose pictures it scores")
    if args.explain and not args.FA:
        parser.error("--explain has no effect without --FA: diffusers' own attention chooses no kernel")
    if args.warmup is None:
        args.warmup = 1 if args.dynamo else 0
    return args


def strength(argument: str) -> float:
    share = finite_float(argument)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"must be more than 0 and at most 1, not {argument}")
    return share


def lora(argument: str) -> Lora:
    """FILE or FILE:SCALE; a name that ends in .safetensors is a file whatever is in it."""
    name, _, scale = argument.rpartition(":")
    if not name or argument.endswith(".safetensors"):
        return Lora(file_path(argument), 1.0)
    return Lora(file_path(name), finite_float(scale))


def add_lora_argument(add: Callable[..., object], dest: str = "lora") -> None:
    add(
        "--lora",
        type=lora,
        action="append",
        default=[],
        dest=dest,
        metavar="FILE[:SCALE]",
        help="an adapter in .safetensors; repeat it for several (scale 1)"
        + ("" if dest == "lora" else "; of rows that name none"),
    )


def add_model_argument(add: Callable[..., object], default: Path) -> None:
    help = "pipeline in diffusers' layout, or a checkpoint FILE.safetensors (demo model)"
    add("--model_path", type=file_path, default=default, metavar="DIR", help=help)
    help = "of a checkpoint: folder in diffusers' layout with its configurations (from the hub or its cache)"
    add("--config", type=file_path, metavar="DIR", help=help)


def add_step_and_size_arguments(add: Callable[..., object]) -> None:
    """How prompts are read, how long to draw and how large, for `add` of an argument group."""
    add(
        "--prompt_weights",
        action="store_true",
        help="read (word)1.3, word++ and prompts beyond 77 tokens as compel does",
    )
    add("--steps", type=positive_int, default=50, metavar="N", help="denoising steps (50)")
    add(
        "--guidance_scale",
        type=finite_float,
        metavar="G",
        help=f"1 or less turns guidance off (what {DEFAULTS} in the model's folder says, else {GUIDANCE_SCALE})",
    )
    add("--height", type=image_size, metavar="PIXELS", help="multiple of 8 (the model's)")
    add("--width", type=image_size, metavar="PIXELS", help="multiple of 8 (the model's)")
    add("--scheduler", choices=SCHEDULERS, metavar="NAME", help=f"{', '.join(SCHEDULERS)} (the model's)")


def add_acceleration_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("accelerations").add_argument
    add("--FA", action="store_true", help="fused attention kernel")
    add(
        "--kernels",
        type=kernel_list,
        metavar="NAME[,NAME]",
        help=f"of --FA only these, in case one fails on a card: {', '.join(kernel_names())}",
    )
    add("--TOME", nargs="?", type=merge_ratio, const=0.5, metavar="RATIO", help="merge this share of the tokens (0.5)")
    add(
        "--DC",
        nargs="?",
        type=cache_interval,
        const=0,
        metavar="INTERVAL",
        help=f"DeepCache: every INTERVAL-th step is a full one ({DEFAULT_INTERVAL})",
    )
    add(
        "--cache_schedule",
        type=cache_schedule,
        metavar="S",
        help="which steps are full ones: uniform, quadratic[:CENTRE[,POWER]], early[:STEPS] or a list 0,4,8,...",
    )
    add(
        "--forecast",
        nargs="?",
        choices=BETWEEN,
        const=BETWEEN[0],
        metavar="BETWEEN",
        help="forecast what full steps would give; the others run shallow, some of them (mixed), or none (skip)",
    )
    add(
        "--fast",
        nargs="?",
        choices=FAST,
        const="balanced",
        metavar="HOW",
        help="few full steps, the others forecast, in the place of --DC: "
        + ", ".join(
            f"{row} ({few} of them, {more} beyond guidance {MODERATE_GUIDANCE:g})" for row, (few, more) in FAST.items()
        )
        + ", or those of a model's own file (balanced)",
    )
    add(
        "--schedule",
        type=file_path,
        metavar="FILE",
        help=f"of --fast: steps found by scripts/schedules/find.py ({FILE_NAME} beside the model, where it has a row)",
    )
    add("--dynamo", action="store_true", help="compile to graphs: torchair on an NPU, inductor elsewhere")
    add(
        "--graph_cache",
        type=file_path,
        metavar="DIR",
        help="where an NPU's graphs are kept (the user's cache directory)",
    )
    add("--graph_cache_limit", type=byte_size, metavar="SIZE", help="as 8GiB: remove the oldest graphs beyond that")


def complete(args: argparse.Namespace) -> None:
    """Fill in `guidance_scale` and `cache`, which depend on other arguments, for both command lines.

    Raises:
        UserError: an argument would have no effect, or the model's defaults are wrong.
    """
    if args.guidance_scale is None:
        args.guidance_scale = guidance_scale_of(args.config or args.model_path)
    if args.negative_prompt and args.guidance_scale <= 1:
        raise UserError(
            f"--negative_prompt has no effect: it takes guidance, and --guidance_scale {args.guidance_scale:g} turns "
            "that off; take more than 1"
        )
    if args.kernels and not args.FA:
        raise UserError(f"--kernels {','.join(args.kernels)} has no effect without --FA, which runs them")
    for name in ("graph_cache", "graph_cache_limit"):
        if getattr(args, name) is not None and not args.dynamo:
            raise UserError(f"--{name} has no effect without --dynamo, which makes graphs")
    args.cache, args.fast_row = choose_cache(args)


def choose_prompts(args: argparse.Namespace, folder: Path) -> list[str]:
    prompts = [*args.prompt, *(read_prompts(args.prompt_file) if args.prompt_file else [])]
    if any(not prompt.strip() for prompt in prompts):
        raise UserError("--prompt is empty")
    if not prompts and args.model_path.resolve() != (folder / DEMO_MODEL).resolve():
        raise UserError("there is nothing to draw: give --prompt or --prompt_file")
    return prompts or read_prompts(folder / DEMO_PROMPTS)


def kernel_list(argument: str) -> tuple[str, ...] | None:
    try:
        return check_kernels([name.strip() for name in argument.split(",")])
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def merge_ratio(argument: str) -> float:
    """The share of the tokens that token merging removes."""
    ratio = finite_float(argument)
    try:
        check_ratio(ratio)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if ratio == 0:
        raise argparse.ArgumentTypeError("must be more than 0, which merges nothing")
    return ratio
