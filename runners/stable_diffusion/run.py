"""What run_sd.py does: it draws prompts, one call of the pipeline for each, on one device or several."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import StableDiffusionPipeline
from PIL import Image

from ascend.device import DeviceManager, get_device_info
from ascend.memory import keep_freed_memory
from ascend.parallel import Mesh, choose_branch_size, process_group, share_guidance, world_size
from runners.checkpoint import check_model
from runners.cli import UserError, one_line_errors
from runners.devices import choose_device, choose_dtype
from runners.files import make_output_dir
from runners.model_dir import Model, require_patched_diffusers
from runners.report import Report
from runners.stable_diffusion.arguments import parse_arguments
from runners.stable_diffusion.fast import describe_fast
from runners.stable_diffusion.pictures import Call, Costs, call_pipeline, warm_up
from runners.stable_diffusion.pipeline import (
    SETTINGS,
    accelerate,
    check_before_loading,
    cost_of_unet,
    make_pipeline,
    settings_in_use,
)
from runners.stable_diffusion.prompts import check_prompts, warn_of_long_prompts
from runners.stable_diffusion.results import compare, list_costs, save_pictures, summary

if TYPE_CHECKING:
    from runners.clip import CLIPInferenceService


def run(args: argparse.Namespace) -> None:
    require_patched_diffusers()
    report = Report()
    model = check_model(args.model_path, args.config)
    check_prompts(args, [*args.prompts, args.negative_prompt])
    args.output_dir = make_output_dir(args.output_dir)
    manager = choose_device(args, report)
    if manager.device.type == "cpu":
        keep_freed_memory()
    args.dtype = choose_dtype(args, manager, report)
    if args.cfg_parallel == 2 and world_size() == 1:
        raise UserError("--cfg_parallel 2 has no effect on one device: run_sd.sh --device_list=0,1 starts two")
    has_guidance = args.guidance_scale > 1
    with process_group(manager.device, choose_branch_size(world_size(), has_guidance, args.cfg_parallel)) as mesh:
        check_shares(args, mesh)
        run_rank(args, model, manager, mesh, report)


def check_shares(args: argparse.Namespace, mesh: Mesh) -> None:
    """Raise unless all ranks draw the same, and each group of them has something to draw."""
    flags = {
        name: getattr(args, name)
        for name in ("TOME", "FA", "kernels", "cache", "dynamo", "strength", "prompt_weights", "scheduler")
    }
    flags |= {name: str(getattr(args, name)) for name in ("dtype", "image", "mask", "lora", "config")}
    settings = {name: getattr(args, name) for name in SETTINGS}
    mesh.require_same({"model_path": str(args.model_path), "prompts": args.prompts, **settings, **flags})
    if len(args.prompts) < mesh.data_size:
        raise UserError(
            f"{mesh.world_size} devices draw {mesh.data_size} prompts at a time, and there are {len(args.prompts)}: "
            "take fewer devices or more prompts"
        )
    if args.compare and mesh.data_size > 1:
        raise UserError(f"--compare takes one device, or two for one picture, not {mesh.world_size}")


def run_rank(args: argparse.Namespace, model: Model, manager: DeviceManager, mesh: Mesh, report: Report) -> None:
    """What one process does: it draws its share, writes each picture, and, on rank 0, the report."""
    scorer = load_scorer(args.clip_model) if args.clip_model else None  # first: a model that is none is said at once
    start = time.perf_counter()
    scheduler = check_before_loading(args, model, manager.device, report)
    pipe = make_pipeline(args, model, scheduler, manager, args.dtype, report)
    manager.synchronize()
    load_seconds = time.perf_counter() - start
    warn_of_long_prompts(pipe, args, [*args.prompts, args.negative_prompt], report)

    before: list[Image.Image] = []
    after: list[Image.Image] = []
    entries: list[dict[str, Any]] = []

    def keep_plain(call: Call) -> None:
        for warning in call.warnings:
            report.warn(f"without accelerations: {warning}")
        before.extend(call.images)

    plain = draw(pipe, args, manager, mesh, {}, keep_plain) if args.compare else None
    flags = accelerate(pipe, args, report)
    if args.explain and mesh.rank == 0:
        print(*flags["FA"]["explain"], sep="\n", flush=True)
    if args.fast_row and mesh.rank == 0:
        print(describe_fast(args), flush=True)
    share_guidance(pipe, mesh)
    if args.dynamo and not args.warmup:
        report.warn("with --warmup 0 the time of the first pictures includes compiling")
    report.sections = {
        "device": {**get_device_info(manager.device), "dtype": str(args.dtype)},
        "settings": settings_in_use(args, pipe),
        "flags": flags,
        "devices": {"all": mesh.world_size, "for each picture": mesh.branch_size},
        "load_seconds": load_seconds,
    }
    about = {name: report.sections[name] for name in ("settings", "flags", "device")}

    def keep(call: Call) -> None:
        for warning in call.warnings:
            report.warn(warning)
        if mesh.branch == 0:
            entries.extend(save_pictures(call, args, about))
        if args.compare:
            after.extend(call.images)

    try:
        drawn = draw(pipe, args, manager, mesh, args.cache, keep, compiled=args.dynamo)
    except BaseException:
        if entries and mesh.rank == 0:
            write_unfinished(report, entries, args)
        raise
    report.sections["costs"] = list_costs(drawn, args, compiled=args.dynamo)
    everywhere = mesh.gather(entries)
    if everywhere is None:
        return
    report.sections["images"] = sorted(sum(everywhere, []), key=lambda entry: entry["file"])
    report.sections["unet"] = cost_of_unet(args, pipe)
    if plain:
        report.sections["comparison"] = compare((plain, before), (drawn, after), args, scorer)
    report.write(args.output_dir / "report.json")
    print(summary(report.sections))
    print(f"{len(report.sections['images'])} pictures and report.json are in {args.output_dir}")


def load_scorer(model: str) -> CLIPInferenceService:
    """On the CPU, so that scores depend on the pictures alone."""
    from runners.clip import CLIPInferenceService  # takes a while, and few runs score

    return CLIPInferenceService(model, "cpu")


def write_unfinished(report: Report, entries: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Say what is there of a run that ends before its end; the reason is on its way to `one_line_errors`."""
    wanted = len(args.prompts) * args.num_images
    report.warn(f"the run ended before its end: {len(entries)} of {wanted} pictures are drawn")
    report.sections["images"] = entries
    report.write(args.output_dir / "report.json")
    print(f"{len(entries)} of {wanted} pictures and report.json are in {args.output_dir}")


def draw(
    pipe: StableDiffusionPipeline,
    args: argparse.Namespace,
    manager: DeviceManager,
    mesh: Mesh,
    cache: dict[str, Any],
    keep: Callable[[Call], None],
    compiled: bool = False,
) -> Costs:
    """Draw this process's prompts, one call of the pipeline for each, after the warm-up, and give each to `keep`."""
    manager.reset_peak_memory()
    costs = Costs(warm_up(pipe, args, manager, cache, compiled, quiet=mesh.rank > 0))
    for number in mesh.share(len(args.prompts)):
        call = call_pipeline(pipe, args, manager, number, cache)
        costs.add(call)
        keep(call)
    costs.peak_memory = manager.memory_stats()["peak"]
    return costs


def main(description: str | None, folder: Path, arguments: Sequence[str] | None = None) -> None:
    """Run the command line of the program that `description` describes, in `folder`, beside its demo model."""
    with one_line_errors():
        run(parse_arguments(description, folder, arguments))
