"""The pipeline that the arguments ask for, which run_sd.py and the workers of generate_batch.py draw with."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import SchedulerMixin, StableDiffusionPipeline

from ascend.device import DeviceManager
from ascend.graphs.compile import compile_pipeline
from ascend.graphs.store import default_graph_cache
from ascend.planner import MemoryPlan, PlanError, Request, apply_plan, plan_memory
from processors import AttnProcessor2_0Tome, enable_flash_attention, enable_token_merging
from processors.kernels.call import AttentionCall
from processors.kernels.select import explain, select_kernel
from processors.models.self_attentions import largest_call
from runners.cache_options import count_steps, unet_times
from runners.cli import UserError
from runners.devices import check_compiler
from runners.files import make_output_dir
from runners.model_dir import Model, load_pipeline
from runners.report import Report
from runners.schedulers import check_steps, make_scheduler
from runners.stable_diffusion.adapters import check_loras, fuse_loras
from runners.stable_diffusion.inputs import pipeline_class, read_inputs, steps_drawn
from runners.unet_cost import picture_cost

SETTINGS = ("negative_prompt", "steps", "guidance_scale", "height", "width", "num_images", "seed", "warmup")


def check_before_loading(
    args: argparse.Namespace, model: Model, device: torch.device, report: Report
) -> SchedulerMixin:
    """What can be found wrong without weights. The result is the scheduler that draws.

    Raises:
        UserError: the steps, their cache, the size or the graphs' cache are impossible.
    """
    if args.dynamo:
        check_compiler(device)
        if device.type == "npu":
            make_output_dir(args.graph_cache or default_graph_cache(), "the cache of graphs")
        for name in ("graph_cache", "graph_cache_limit") if device.type != "npu" else ():
            if getattr(args, name) is not None:
                report.warn(f"--{name} has no effect on {device.type}: it is of the graphs of NPUs")
    check_loras(args.lora)
    read_inputs(args)
    choose_size(args, model)
    return choose_scheduler(args, model)


def choose_scheduler(args: argparse.Namespace, model: Model) -> SchedulerMixin:
    """The one that draws, with `args.cache_steps` counted. Raises UserError: it cannot take the steps or the cache."""
    scheduler = model.load_scheduler()
    if args.scheduler:
        scheduler = make_scheduler(args.scheduler, like=scheduler)
    check_steps(scheduler, args.steps)
    skipped = args.steps - steps_drawn(args)
    if skipped == args.steps:
        raise UserError(f"--strength {args.strength:g} of --steps {args.steps} leaves no step: take more of either")
    if args.cache:
        args.cache_steps = count_steps(scheduler, args.steps, args.cache, skipped)
    return scheduler


def make_pipeline(
    args: argparse.Namespace,
    model: Model,
    scheduler: SchedulerMixin,
    manager: DeviceManager,
    dtype: torch.dtype,
    report: Report,
) -> StableDiffusionPipeline:
    """The pipeline where it is to be, without accelerations."""
    memory_plan = plan(args, model, manager.device, dtype, report)
    pipe = load_pipeline(pipeline_class(args), args.model_path, dtype, model, scheduler=scheduler)
    fuse_loras(pipe, args.lora)
    if memory_plan is None or memory_plan.is_resident:
        pipe.to(manager.device, silence_dtype_warnings=True)  # choose_dtype says what float16 means on the CPU
        return pipe
    try:
        apply_plan(pipe, memory_plan, manager.device, model.folder)
    except ValueError as error:
        raise UserError(f"--memory {args.memory}: {error}") from error
    return pipe


def choose_size(args: argparse.Namespace, model: Model) -> None:
    """Fill in the size that the model was trained for, each side on its own; the pipeline would replace both."""
    sample = model.configs["unet"].get("sample_size")
    height, width = sample if isinstance(sample, list | tuple) else (sample, sample)
    if None in (args.height or height, args.width or width):
        raise UserError(f"{model.folder} does not say which size it draws: give --height and --width")
    scale = 2 ** (len(model.configs["vae"].get("block_out_channels", [0])) - 1)
    args.height = args.height or height * scale
    args.width = args.width or width * scale


def plan(
    args: argparse.Namespace, model: Model, device: torch.device, dtype: torch.dtype, report: Report
) -> MemoryPlan | None:
    """Where the models are to be, printed unless all are on the device; None on the CPU, where they are anyway.

    Raises:
        UserError: no placement fits, or what is asked for cannot be.
    """
    if device.type == "cpu" and args.memory in ("auto", "resident"):
        if args.memory_limit is not None:
            report.warn("--memory_limit has no effect on the CPU: models are in the host's memory")
        return None
    if args.memory == "disk" and model.checkpoint:
        raise UserError(
            "--memory disk wants a folder in diffusers' layout: a checkpoint in one file has other weights"
        )
    request = Request(args.height, args.width, args.num_images, args.guidance_scale > 1, bool(args.image))
    fused = True if args.FA else None
    try:
        found = plan_memory(
            model.folder, device, request, dtype, args.steps, args.memory, args.memory_limit, fused_attention=fused
        )
    except PlanError as error:
        raise UserError(str(error)) from error
    if not found.is_resident:
        print(found.table(), flush=True)
    return found


def settings_in_use(args: argparse.Namespace, pipe: StableDiffusionPipeline) -> dict[str, Any]:
    """The arguments that decide what the pictures look like, for the report and the pictures' metadata."""
    given: dict[str, Any] = {name: str(getattr(args, name)) for name in ("image", "mask") if getattr(args, name)}
    if args.image:
        given["strength"] = args.strength
    if args.lora:
        given["lora"] = {str(lora.path): lora.scale for lora in args.lora}
    if args.prompt_weights:
        given["prompt_weights"] = True
    return (
        {name: getattr(args, name) for name in SETTINGS}
        | given
        | {
            "model_path": str(args.model_path),
            "scheduler": type(pipe.scheduler).__name__,
        }
    )


def accelerate(pipe: StableDiffusionPipeline, args: argparse.Namespace, report: Report) -> dict[str, Any]:
    """Switch on what the arguments ask for. The result says of each flag what it did, None for one that is off.

    What a flag does not reach is warned of. Raises UserError where one can do nothing.
    """
    flags: dict[str, Any] = dict.fromkeys(("FA", "TOME", "DC", "fast", "dynamo"))
    if args.FA:
        with refusals_of("--FA"):
            flags["FA"] = {"components": enable_flash_attention(pipe, kernels=args.kernels)}
    if args.TOME:
        with refusals_of("--TOME"):
            components = enable_token_merging(pipe, ratio=args.TOME)
        blocks = sum(isinstance(p, AttnProcessor2_0Tome) for p in pipe.unet.attn_processors.values())
        flags["TOME"] = {"ratio": args.TOME, "blocks": blocks, "components": components}
    for name in filter(flags.get, ("FA", "TOME")):
        for component, what in flags[name]["components"].items():
            if "not covered" in what:
                report.warn(f"--{name}, {component}: {what}")
    if args.FA:  # after token merging, which makes the calls smaller
        call = largest_attention(pipe, args)
        flags["FA"] |= {"kernel": select_kernel(call).name, "explain": explain(call).splitlines()}
    if args.cache:
        flags["DC"] = args.cache | args.cache_steps
        flags["fast"] = args.fast_row
    if args.dynamo:
        flags["dynamo"] = compile_pipeline(pipe, args.graph_cache, args.graph_cache_limit)
        for component, backend in flags["dynamo"].items():
            if backend == "eager" and (pipe.device.type == "npu" or component == "unet"):
                report.warn(f"--dynamo, {component}: not compiled, as it is offloaded or not where the UNet is")
    return flags


def cost_of_unet(args: argparse.Namespace, pipe: StableDiffusionPipeline) -> dict[str, Any]:
    """See `picture_cost`, of one prompt's pictures."""
    calls = len(unet_times(pipe.scheduler, args.steps, args.steps - steps_drawn(args)))
    size = args.height // pipe.vae_scale_factor, args.width // pipe.vae_scale_factor
    forecast = args.cache.get("cache_forecast", False)
    steps = args.cache_steps if args.cache else {}
    rows = args.num_images * (2 if args.guidance_scale > 1 else 1)
    shallow_rows = args.num_images if forecast else rows
    merging = {"ratio": args.TOME} if args.TOME else None
    return picture_cost(pipe.unet.config, steps, calls, rows, shallow_rows, size, merging)


@contextmanager
def refusals_of(flag: str) -> Iterator[None]:
    """A model that a switch is not for is the user's to change."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from error


def largest_attention(pipe: StableDiffusionPipeline, args: argparse.Namespace) -> AttentionCall:
    """The self-attention over the most tokens in a step of these pictures."""
    batch = args.num_images * (2 if args.guidance_scale > 1 else 1)
    scale = pipe.vae_scale_factor
    return largest_call(pipe.unet, batch, args.height // scale, args.width // scale)
