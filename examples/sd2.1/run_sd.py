"""Pictures from text with Stable Diffusion 2.1, on an Ascend NPU, a GPU or the CPU.

    python examples/sd2.1/run_sd.py --prompt "a large red circle in the centre, white background" --FA --TOME --DC

Writes the pictures, report.json and, with --compare, comparison.png to --output_dir.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # without CANN it would end in a traceback here
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages on the CPU: processes hold each other up less

from diffusers import StableDiffusionPipeline

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from pictures import Drawing, call_pipeline, seeds_of

from ascend.device import DeviceManager, get_chip, get_device_info
from ascend.graph import compile_pipeline
from ascend.parallel import Mesh, choose_branch_size, process_group, share_guidance, world_size
from examples.common.cache_options import (
    DEFAULT_INTERVAL,
    cache_interval,
    cache_options,
    cache_schedule,
    count_full_steps,
)
from examples.common.cli import (
    ArgumentParser,
    UserError,
    finite_float,
    image_size,
    non_negative_int,
    one_line_errors,
    positive_int,
    read_prompts,
)
from examples.common.devices import add_device_arguments, check_compiler, choose_device, choose_dtype
from examples.common.files import make_output_dir
from examples.common.images import GridRow, save_png, side_by_side, similarity
from examples.common.model_dir import load_pipeline, require_patched_diffusers
from examples.common.overflow import clear_overflow_flag, overflow_warning
from examples.common.report import Report, format_table, versions
from examples.common.schedulers import SCHEDULERS, make_scheduler
from processors import AttnProcessor2_0Tome, enable_flash_attention, enable_token_merging
from processors.kernels import AttentionCall, select_kernel
from processors.tome_processor import check_ratio

DEMO_MODEL = HERE / "demo_model"
DEMO_PROMPTS = HERE / "prompts.txt"
GUIDANCE_SCALE, DEMO_GUIDANCE_SCALE = 7.5, 1.5  # so small a model draws worse pictures with stronger guidance
MAX_SEED = 2**63 - 1
SETTINGS = ("negative_prompt", "steps", "guidance_scale", "height", "width", "num_images", "seed", "warmup")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="run_sd.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("what to draw").add_argument
    add(
        "--model_path", type=Path, default=DEMO_MODEL, metavar="DIR", help="pipeline in diffusers' layout (demo model)"
    )
    add("--prompt", action="append", default=[], metavar="TEXT", help="repeat it for more pictures")
    add("--prompt_file", type=Path, metavar="FILE", help="UTF-8 text, a prompt on each line")
    add("--negative_prompt", default="", metavar="TEXT", help="what the pictures should not show")
    add_step_and_size_arguments(add)
    add("--num_images", type=positive_int, default=1, metavar="N", help="pictures of each prompt, made together (1)")
    add("--scheduler", choices=SCHEDULERS, metavar="NAME", help=f"{', '.join(SCHEDULERS)} (the model's)")
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
    add("--output_dir", type=Path, default=Path("outputs/sd2.1"), metavar="DIR", help="(outputs/sd2.1)")
    add("--compare", action="store_true", help="also draw without accelerations and compare")

    args = parser.parse_args(arguments)
    args.prompts = choose_prompts(args)
    choose_guidance_and_cache(args)
    if args.seed + len(args.prompts) * args.num_images > MAX_SEED:
        parser.error(f"--seed {args.seed} is too large: seeds end at {MAX_SEED}")
    if args.compare and not (args.FA or args.TOME or args.cache or args.dynamo):
        parser.error("--compare needs an acceleration to compare: --FA, --TOME, --DC or --dynamo")
    if args.warmup is None:
        args.warmup = 1 if args.dynamo else 0
    return args


def add_step_and_size_arguments(add: Callable[..., object]) -> None:
    """How long to draw and how large, for `add` of an argument group."""
    add("--steps", type=positive_int, default=50, metavar="N", help="denoising steps (50)")
    add(
        "--guidance_scale",
        type=finite_float,
        metavar="G",
        help=f"1 or less turns guidance off ({GUIDANCE_SCALE}; demo model: {DEMO_GUIDANCE_SCALE})",
    )
    add("--height", type=image_size, metavar="PIXELS", help="multiple of 8 (the model's)")
    add("--width", type=image_size, metavar="PIXELS", help="multiple of 8 (the model's)")


def add_acceleration_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("accelerations").add_argument
    add("--FA", action="store_true", help="fused attention kernel")
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
        help="which steps are full ones: uniform, quadratic[:CENTRE[,POWER]] or a list 0,4,8,...",
    )
    add("--dynamo", action="store_true", help="compile to graphs: torchair on an NPU, inductor elsewhere")
    add("--graph_cache", type=Path, metavar="DIR", help="where an NPU's graphs are kept (the user's cache directory)")


def choose_guidance_and_cache(args: argparse.Namespace) -> None:
    """Fill in what depends on other arguments: `guidance_scale`, and `cache` for the pipeline."""
    if args.guidance_scale is None:
        args.guidance_scale = DEMO_GUIDANCE_SCALE if args.model_path == DEMO_MODEL else GUIDANCE_SCALE
    args.cache = cache_options(args.DC, args.cache_schedule)


def choose_prompts(args: argparse.Namespace) -> list[str]:
    prompts = [*args.prompt, *(read_prompts(args.prompt_file) if args.prompt_file else [])]
    if any(not prompt.strip() for prompt in prompts):
        raise UserError("--prompt is empty")
    if not prompts and args.model_path != DEMO_MODEL:
        raise UserError("there is nothing to draw: give --prompt or --prompt_file")
    return prompts or read_prompts(DEMO_PROMPTS)


def merge_ratio(text: str) -> float:
    """The share of the tokens that token merging removes."""
    ratio = finite_float(text)
    try:
        check_ratio(ratio)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if ratio == 0:
        raise argparse.ArgumentTypeError("must be more than 0, which merges nothing")
    return ratio


def run(args: argparse.Namespace) -> None:
    require_patched_diffusers()
    report = Report()
    args.output_dir = make_output_dir(args.output_dir)
    manager = choose_device(args, report)
    args.dtype = choose_dtype(args, manager, report)
    if args.dynamo:
        check_compiler(manager.device)
    has_guidance = args.guidance_scale > 1
    with process_group(manager.device, choose_branch_size(world_size(), has_guidance, args.cfg_parallel)) as mesh:
        check_shares(args, mesh)
        run_rank(args, manager, mesh, report)


def check_shares(args: argparse.Namespace, mesh: Mesh) -> None:
    """Raise unless all ranks draw the same, and each group of them has something to draw."""
    flags = {"TOME": args.TOME, "FA": args.FA, "DC": args.cache, "dynamo": args.dynamo, "dtype": str(args.dtype)}
    settings = {name: getattr(args, name) for name in SETTINGS}
    mesh.require_same({"model_path": str(args.model_path), "prompts": args.prompts, **settings, **flags})
    if len(args.prompts) < mesh.data_size:
        raise UserError(
            f"{mesh.world_size} devices draw {mesh.data_size} prompts at a time, and there are {len(args.prompts)}: "
            "take fewer devices or more prompts"
        )
    if args.compare and mesh.data_size > 1:
        raise UserError(f"--compare takes one device, or two for one picture, not {mesh.world_size}")


def run_rank(args: argparse.Namespace, manager: DeviceManager, mesh: Mesh, report: Report) -> None:
    """What one process does: it draws its share, writes its pictures, and, on rank 0, the report."""
    start = time.perf_counter()
    pipe = load_pipeline(StableDiffusionPipeline, args.model_path, args.dtype).to(manager.device)
    pipe.set_progress_bar_config(disable=mesh.rank > 0)
    manager.synchronize()
    load_seconds = time.perf_counter() - start
    if args.scheduler:
        pipe.scheduler = make_scheduler(args.scheduler, like=pipe.scheduler)
    choose_size(args, pipe)
    warn_of_long_prompts(args, pipe, report)
    if args.cache:
        args.cache_steps = count_full_steps(
            pipe.scheduler, args.steps, args.cache
        )  # finds mistakes before any picture

    plain = draw(pipe, args, manager, mesh, report, cache={}) if args.compare else None
    flags = accelerate(pipe, args)
    share_guidance(pipe, mesh)
    drawn = draw(pipe, args, manager, mesh, report, args.cache)
    if args.dynamo and not args.warmup:
        report.warn("with --warmup 0 the time of the first pictures includes compiling")

    report.sections = {
        "device": {**get_device_info(manager.device), "dtype": str(args.dtype)},
        "settings": settings_in_use(args, pipe),
        "flags": flags,
        "devices": {"all": mesh.world_size, "for each picture": mesh.branch_size},
        "load_seconds": load_seconds,
        "costs": costs(drawn, args, compiled=args.dynamo),
    }
    entries = save_pictures(drawn, args, report.sections) if mesh.branch == 0 else []
    everywhere = mesh.gather(entries)
    if everywhere is None:
        return
    report.sections["images"] = sorted(sum(everywhere, []), key=lambda entry: entry["file"])
    if plain:
        report.sections["comparison"] = compare(plain, drawn, args)
    report.write(args.output_dir / "report.json")
    print(summary(report.sections))
    print(f"{len(report.sections['images'])} pictures and report.json are in {args.output_dir}")


def settings_in_use(args: argparse.Namespace, pipe: StableDiffusionPipeline) -> dict[str, Any]:
    """The arguments that decide what the pictures look like, for the report and the pictures' metadata."""
    return {name: getattr(args, name) for name in SETTINGS} | {
        "model_path": str(args.model_path),
        "scheduler": type(pipe.scheduler).__name__,
    }


def choose_size(args: argparse.Namespace, pipe: StableDiffusionPipeline) -> None:
    """Fill in the size that the model was trained for, each side on its own; the pipeline would replace both."""
    sample = pipe.unet.config.sample_size
    height, width = (sample, sample) if isinstance(sample, int) else sample
    args.height = args.height or height * pipe.vae_scale_factor
    args.width = args.width or width * pipe.vae_scale_factor


def warn_of_long_prompts(args: argparse.Namespace, pipe: StableDiffusionPipeline, report: Report) -> None:
    limit = pipe.tokenizer.model_max_length
    for prompt in [*args.prompts, args.negative_prompt]:
        length = len(pipe.tokenizer(prompt).input_ids)
        if length > limit:
            report.warn(f"a prompt of {length} tokens is cut after {limit}: '{prompt[:60]}...'")


def accelerate(pipe: StableDiffusionPipeline, args: argparse.Namespace) -> dict[str, Any]:
    """Switch on what the arguments ask for. The result says of each flag what it did, None for one that is off."""
    flags: dict[str, Any] = dict.fromkeys(("FA", "TOME", "DC", "dynamo"))
    if args.FA:
        enable_flash_attention(pipe)
        flags["FA"] = {"kernel": largest_attention_kernel(pipe, args)}
    if args.TOME:
        enable_token_merging(pipe, ratio=args.TOME)
        blocks = [name for name, p in pipe.unet.attn_processors.items() if isinstance(p, AttnProcessor2_0Tome)]
        flags["TOME"] = {"ratio": args.TOME, "blocks": len(blocks)}
    if args.cache:
        flags["DC"] = args.cache | args.cache_steps
    if args.dynamo:
        flags["dynamo"] = compile_pipeline(pipe, args.graph_cache)
    return flags


def largest_attention_kernel(pipe: StableDiffusionPipeline, args: argparse.Namespace) -> str:
    """Name of the kernel for the self-attention over the most tokens, that of the UNet's first block."""
    attention = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    tokens = args.height * args.width // pipe.vae_scale_factor**2
    call = AttentionCall(
        device_type=pipe.device.type,
        chip=get_chip(pipe.device),
        dtype=pipe.unet.dtype,
        batch=args.num_images * (2 if args.guidance_scale > 1 else 1),
        heads=attention.heads,
        query_length=tokens,
        key_length=tokens,
        head_dim=attention.inner_dim // attention.heads,
    )
    return select_kernel(call).name


def draw(
    pipe: StableDiffusionPipeline,
    args: argparse.Namespace,
    manager: DeviceManager,
    mesh: Mesh,
    report: Report,
    cache: dict[str, Any],
) -> Drawing:
    """The pictures of this process's prompts, one call of the pipeline for each prompt, after the warm-up."""
    clear_overflow_flag(manager.device)
    manager.reset_peak_memory()
    warmup_seconds = [call_pipeline(pipe, args, manager, 0, cache).seconds for _ in range(args.warmup)]
    calls = [call_pipeline(pipe, args, manager, number, cache) for number in mesh.share(len(args.prompts))]
    drawing = Drawing(calls, warmup_seconds, manager.memory_stats()["peak"])
    warning = overflow_warning(drawing.images, manager.device)
    if warning:
        report.warn(warning)
    return drawing


def costs(drawing: Drawing, args: argparse.Namespace, compiled: bool) -> dict[str, float | None]:
    return {
        "compile_seconds": drawing.seconds_to_compile() if compiled else None,
        "seconds_per_image": drawing.seconds_per_image(),
        "seconds_per_step": drawing.seconds_per_step(args.steps),
        "peak_memory_bytes": drawing.peak_memory,
    }


def save_pictures(drawing: Drawing, args: argparse.Namespace, sections: dict[str, Any]) -> list[dict[str, Any]]:
    """Write the PNG files, with prompt, seed and settings in each. The result lists them for the report."""
    about = {name: json.dumps(sections[name]) for name in ("settings", "flags", "device")}
    about["versions"] = json.dumps(versions())
    entries: list[dict[str, Any]] = []
    for call in drawing.calls:
        prompt = args.prompts[call.number]
        for index, (seed, image) in enumerate(zip(seeds_of(args, call.number), call.images, strict=True)):
            name = f"{call.number * args.num_images + index:03d}_{slug(prompt)}_{seed}.png"
            save_png(image, args.output_dir / name, {"prompt": prompt, "seed": str(seed), **about})
            entries.append({"file": name, "prompt": prompt, "seed": seed, "seconds": call.seconds / len(call.images)})
    return entries


def slug(prompt: str) -> str:
    """The beginning of a prompt as a part of a file name."""
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:40]


def compare(plain: Drawing, drawn: Drawing, args: argparse.Namespace) -> dict[str, Any]:
    """Write comparison.png. The result says how much faster and how different the accelerated pictures are."""
    pairs = list(zip(drawn.images, plain.images, strict=True))
    captions = [prompt for prompt in args.prompts for _ in range(args.num_images)]
    rows = [GridRow(caption, [before, after]) for caption, (after, before) in zip(captions, pairs, strict=True)]
    headings = [f"plain, {plain.seconds_per_image():.2f} s", f"accelerated, {drawn.seconds_per_image():.2f} s"]
    save_png(side_by_side(headings, rows), args.output_dir / "comparison.png", {})
    return {
        "grid": "comparison.png",
        "plain": costs(plain, args, compiled=False),
        "speed_up": plain.seconds_per_image() / drawn.seconds_per_image(),
        "images": [asdict(similarity(*pair)) for pair in pairs],
    }


def summary(sections: dict[str, Any]) -> str:
    """The costs, with --compare beside those of the plain pictures, as a table."""
    columns = {"accelerated" if any(sections["flags"].values()) else "plain": sections["costs"]}
    comparison = sections.get("comparison")
    if comparison:
        columns = {"plain": comparison["plain"], **columns}
    table = [
        ("compile (s)", [column["compile_seconds"] for column in columns.values()], ".1f"),
        ("per image (s)", [column["seconds_per_image"] for column in columns.values()], ".3f"),
        ("per step (s)", [column["seconds_per_step"] for column in columns.values()], ".4f"),
        ("peak memory (MiB)", [column["peak_memory_bytes"] / 2**20 for column in columns.values()], ".0f"),
    ]
    if comparison:
        psnr = [image["psnr"] for image in comparison["images"] if image["psnr"] is not None]
        table += [
            ("speed-up", [None, comparison["speed_up"]], ".2f"),
            ("PSNR (dB)", [None, sum(psnr) / len(psnr) if psnr else None], ".1f"),
            ("SSIM", [None, sum(image["ssim"] for image in comparison["images"]) / len(comparison["images"])], ".3f"),
        ]
    return format_table(list(columns), table)


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        run(parse_arguments(arguments))


if __name__ == "__main__":
    main()
