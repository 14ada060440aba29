"""Time the accelerations, one by one and together, against none and against the packages tomesd and DeepCache.

    python scripts/benchmarks/benchmark.py                      the demo model, in about a minute for each round
    python scripts/benchmarks/benchmark.py --model sd2.1-base   the true configuration with random weights, 512 x 512
    python scripts/benchmarks/benchmark.py --model sd2.1-base --steps 50 --guidance_scale 1.5 4 7.5 \\
        --interval 3 5 --configs "tomesd + DeepCache" "DPM++ 2M" "fast balanced + dynamo"

Each round runs every configuration once, so that a machine that slows down slows all of them; a speed-up is a ratio
within a round, and its median over the rounds is reported. Only the denoising loop is timed: text encoder and VAE are
the same for all. How far latents are from the plain ones is said for the first guidance scale. Writes benchmark.json
and benchmark.png to --output_dir.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, DDIMScheduler, SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ascend.device import DeviceManager
from ascend.graphs.compile import compile_pipeline
from processors import disable_flash_attention, disable_token_merging, enable_flash_attention, enable_token_merging
from runners.cache_options import FAST, count_steps, fast_options, listed_options
from runners.cli import (
    ArgumentParser,
    UserError,
    file_path,
    finite_float,
    image_size,
    non_negative_int,
    one_line_errors,
    positive_int,
)
from runners.devices import add_device_arguments, check_compiler, choose_device, choose_dtype
from runners.files import make_output_dir
from runners.images import save_figure
from runners.model_dir import load_pipeline, require_patched_diffusers
from runners.report import Report, format_table
from runners.schedule_file import schedule_in
from runners.schedulers import check_steps, make_scheduler
from runners.stable_diffusion.arguments import merge_ratio
from runners.unet_cost import PROMPT_TOKENS

BASELINE = "none"
SOLVERS = {"DDIM": "ddim", "DPM++ 2M": "dpm++", "UniPC": "unipc"}  # of fewer steps
# Ours in capitals, as the runner's flags; the peers by the names of their packages.
CONFIGURATIONS: dict[str, tuple[str, ...]] = {
    BASELINE: (),
    "FA": ("FA",),
    "TOME": ("TOME",),
    "DC": ("DC",),
    "dynamo": ("dynamo",),
    "TOME + DC": ("TOME", "DC"),
    "all": ("FA", "TOME", "DC", "dynamo"),
    **{f"fast {row}": (f"fast {row}",) for row in FAST},
    **{f"fast {row} + dynamo": ("FA", f"fast {row}", "dynamo") for row in FAST},
    "tomesd": ("tomesd",),
    "DeepCache": ("DeepCache",),
    "tomesd + DeepCache": ("tomesd", "DeepCache"),
    **{name: (name,) for name in SOLVERS},
}
CHANGE_MODULES = {"FA", "TOME", "tomesd", "DeepCache"}  # of the flags, those that graphs depend on
SD21_BASE_UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
WARM_UP_STEPS = 4


class Run(NamedTuple):
    config: str
    args: argparse.Namespace  # with one value of each option that takes several
    options: dict[str, Any]  # of the pipeline's calls
    steps: dict[str, int]  # from `count_steps`

    @property
    def flags(self) -> tuple[str, ...]:
        return CONFIGURATIONS[self.config]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("what to time").add_argument
    demo = ROOT / "examples/sd2.1/demo_model"
    add("--model", default=str(demo), metavar="NAME", help="sd2.1-base, or a pipeline's directory (the demo model)")
    add(
        "--configs",
        nargs="+",
        choices=CONFIGURATIONS,
        metavar="NAME",
        help=f"of {', '.join(CONFIGURATIONS)} (all but fast and those of fewer steps)",
    )
    add("--steps", type=positive_int, default=12, metavar="N", help="DDIM steps (12)")
    add("--interval", type=positive_int, nargs="+", default=[3], metavar="N", help="of DeepCache's full steps (3)")
    add(
        "--fewer_steps",
        type=positive_int,
        nargs="+",
        default=[20],
        metavar="N",
        help=f"of {', '.join(SOLVERS)} (20)",
    )
    add(
        "--guidance_scale",
        type=finite_float,
        nargs="+",
        default=[7.5],
        metavar="G",
        help="by which --fast chooses its steps (7.5)",
    )
    add("--schedule", type=file_path, metavar="FILE", help="of the steps of --fast, as run_sd.py takes it")
    add("--ratio", type=merge_ratio, default=0.5, metavar="R", help="of merged tokens (0.5)")
    add("--height", type=image_size, metavar="PIXELS", help="(the model's)")
    add("--width", type=image_size, metavar="PIXELS", help="(the model's)")
    add("--rounds", type=positive_int, default=3, metavar="N", help="(3)")
    add("--seed", type=non_negative_int, default=0, metavar="N", help="of weights and latents (0)")
    add_device_arguments(parser)
    add("--output_dir", type=file_path, default=Path("outputs/benchmark"), metavar="DIR", help="(outputs/benchmark)")
    args = parser.parse_args(arguments)
    # What --fast and fewer steps save depends on the number of steps, which is a small one unless asked for.
    configs = args.configs or [name for name in CONFIGURATIONS if not name.startswith(("fast", *SOLVERS))]
    args.configs = [BASELINE, *(name for name in configs if name != BASELINE)]
    if args.schedule and not any(name.startswith("fast") for name in args.configs):
        parser.error(f"--schedule {args.schedule} has no effect without a configuration of --fast in --configs")
    if len({scale > 1 for scale in args.guidance_scale}) > 1:
        parser.error(
            f"--guidance_scale {args.guidance_scale}: one branch is half of the work, so time those up to 1 apart"
        )
    return args


def runs_of(args: argparse.Namespace, pipe: StableDiffusionPipeline) -> dict[str, Run]:
    """By the names in the table. Raises UserError: --schedule has none for one of them."""
    runs: dict[str, Run] = {}
    first = {name: getattr(args, name)[0] for name in ("guidance_scale", "interval", "fewer_steps")}
    for config in args.configs:
        name, words = varied_option(config)
        values = getattr(args, name) if name else [None]
        for value in values:
            label = f"{config}, {words.format(value)}" if len(values) > 1 else config
            own = argparse.Namespace(**vars(args) | first | ({name: value} if name else {}))
            options = call_options(pipe.scheduler, CONFIGURATIONS[config], own)
            steps = steps_of(pipe.scheduler, CONFIGURATIONS[config], own, options)
            runs[label] = Run(config, own, options, steps)
    return runs


def varied_option(config: str) -> tuple[str, str]:
    """Of the options that take several values the one that changes what `config` does, and its words in the table."""
    flags = CONFIGURATIONS[config]
    if config.startswith("fast"):
        return "guidance_scale", "guidance {:g}"
    if SOLVERS.keys() & set(flags):
        return "fewer_steps", "{} steps"
    return ("interval", "interval {}") if {"DC", "DeepCache"} & set(flags) else ("", "")


def steps_of(
    scheduler: SchedulerMixin, flags: Sequence[str], args: argparse.Namespace, options: dict[str, Any]
) -> dict[str, int]:
    """See `count_steps`. Raises UserError: the scheduler or the cache cannot take them."""
    caching = {name: value for name, value in options.items() if name.startswith("cache_")}
    if "DeepCache" in flags:
        caching = {"cache_interval": args.interval}
    steps = options.get("num_inference_steps", args.steps)
    check_steps(scheduler, steps)
    return count_steps(scheduler, steps, caching)


def sd21_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def make_pipeline(args: argparse.Namespace, manager: DeviceManager, dtype: torch.dtype) -> StableDiffusionPipeline:
    """The pipeline on its device, with DDIM: there the DeepCache package runs the same full steps as the fork."""
    if args.model == "sd2.1-base":
        torch.manual_seed(args.seed)
        pipe = StableDiffusionPipeline(
            unet=UNet2DConditionModel(**SD21_BASE_UNET),
            # The loop does not call them, but the pipeline reads the scale of its latents from the VAE.
            vae=AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(32,) * 4,
            ),
            text_encoder=None,
            tokenizer=None,
            scheduler=sd21_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).to(dtype)
    else:
        pipe = load_pipeline(StableDiffusionPipeline, Path(args.model).expanduser(), dtype)
        pipe.scheduler = make_scheduler("ddim", like=pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(manager.device)


def copy_with_same_weights(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """A pipeline of its own that takes no memory for weights."""
    modules = [component for component in pipe.components.values() if isinstance(component, torch.nn.Module)]
    weights = {id(tensor): tensor for module in modules for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(pipe, weights)


@contextmanager
def switched_on(pipe: StableDiffusionPipeline, flags: Sequence[str], args: argparse.Namespace) -> Iterator[None]:
    """Change the pipeline, and leave it as it was."""
    with ExitStack() as undo:
        if "FA" in flags:
            enable_flash_attention(pipe)
            undo.callback(disable_flash_attention, pipe)
        if "TOME" in flags:
            enable_token_merging(pipe, ratio=args.ratio, max_downsample=1)  # the blocks that tomesd chooses
            undo.callback(disable_token_merging, pipe)
        if "tomesd" in flags:
            import tomesd

            tomesd.apply_patch(pipe, ratio=args.ratio, use_rand=False)
            undo.callback(tomesd.remove_patch, pipe)
        if "DeepCache" in flags:
            from DeepCache import DeepCacheSDHelper

            helper = DeepCacheSDHelper(pipe=pipe)
            helper.set_params(cache_interval=args.interval, cache_branch_id=0)
            helper.enable()
            undo.callback(helper.disable)
        for solver in SOLVERS.keys() & set(flags):
            undo.callback(setattr, pipe, "scheduler", pipe.scheduler)
            pipe.scheduler = make_scheduler(SOLVERS[solver], like=pipe.scheduler)
        yield


def call_options(scheduler: SchedulerMixin, flags: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the pipeline's calls that the flags are."""
    for row in FAST:
        if f"fast {row}" in flags:
            if not args.schedule:
                return fast_options(row, args.guidance_scale)
            name = type(scheduler).__name__
            return schedule_in(args.schedule, row, name, args.steps, args.guidance_scale).options()
    if SOLVERS.keys() & set(flags):
        return {"num_inference_steps": args.fewer_steps}
    return {"cache_interval": args.interval} if "DC" in flags else {}


def warm_up_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those of a short call that does each kind of step that a call with `options` may do."""
    each_kind = listed_options([0, 2], [1, 3]) if "cache_forecast" in options else options
    return each_kind | {"num_inference_steps": WARM_UP_STEPS}


def random_prompts(pipe: StableDiffusionPipeline, generator: torch.Generator) -> torch.Tensor:
    """Embeddings of a prompt and of a negative one, [2, 1, tokens, width], as the UNet takes them."""
    shape = 2, 1, PROMPT_TOKENS, pipe.unet.config.cross_attention_dim
    return torch.randn(shape, generator=generator).to(pipe.unet.device, pipe.unet.dtype)


def denoise(
    pipe: StableDiffusionPipeline, args: argparse.Namespace, manager: DeviceManager, options: dict[str, Any]
) -> tuple[float, torch.Tensor]:
    """Seconds of one denoising loop with guidance, and its latents; `options` are those of `call_options`."""
    generator = torch.Generator().manual_seed(args.seed)
    prompt, negative = random_prompts(pipe, generator)
    manager.synchronize()
    start = time.perf_counter()
    latents = pipe(
        prompt_embeds=prompt,
        negative_prompt_embeds=negative,
        height=args.height,
        width=args.width,
        guidance_scale=args.guidance_scale,
        generator=generator,
        output_type="latent",
        **{"num_inference_steps": args.steps, **options},
    ).images
    manager.synchronize()
    return time.perf_counter() - start, latents


def compiled_pipelines(
    eager: StableDiffusionPipeline, runs: dict[str, Run], manager: DeviceManager, undo: ExitStack
) -> dict[str, StableDiffusionPipeline]:
    """Of each run with graphs its pipeline, which has made them; runs that differ in guidance or steps share one."""
    found: dict[str, StableDiffusionPipeline] = {}
    made: dict[frozenset[str], StableDiffusionPipeline] = {}
    for label, run in tqdm(runs.items(), desc="warm-up"):
        if "dynamo" not in run.flags:
            continue
        check_compiler(manager.device)
        kind = frozenset(run.flags) & CHANGE_MODULES
        if kind not in made:
            made[kind] = copy_with_same_weights(eager)  # switching one pipeline to and fro would drop its graphs
            undo.enter_context(switched_on(made[kind], run.flags, run.args))
            compile_pipeline(made[kind])
        found[label] = made[kind]
        denoise(found[label], run.args, manager, warm_up_options(run.options))
    return found


def measure(args: argparse.Namespace, manager: DeviceManager, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Of each run the seconds of every round, the median speed-up and the distance to the plain latents.

    The distance is None where guidance is another one than that of the plain latents.
    """
    eager = make_pipeline(args, manager, dtype)
    runs = runs_of(args, eager)
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    latents: dict[str, torch.Tensor] = {}
    with ExitStack() as undo:
        # Not counted: what compiles, and what fills the caches of the eager pipeline.
        denoise(eager, runs[BASELINE].args, manager, warm_up_options({}))
        compiled = compiled_pipelines(eager, runs, manager, undo)
        for number in range(args.rounds):
            for label, run in tqdm(runs.items(), desc=f"round {number + 1}"):
                pipe = compiled.get(label, eager)
                with nullcontext() if label in compiled else switched_on(pipe, run.flags, run.args):
                    taken, latents[label] = denoise(pipe, run.args, manager, run.options)
                seconds[label].append(taken)

    plain, scale = latents[BASELINE].float(), runs[BASELINE].args.guidance_scale
    return {
        label: {
            "config": run.config,
            **{name: getattr(run.args, name) for name in varied_option(run.config)[:1] if name},
            **run.steps,
            "seconds": seconds[label],
            "speed_up": statistics.median(b / t for b, t in zip(seconds[BASELINE], seconds[label], strict=True)),
            "relative_error": ((latents[label].float() - plain).norm() / plain.norm()).item()
            if run.args.guidance_scale == scale
            else None,
        }
        for label, run in runs.items()
    }


def plot(results: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    names = list(results)[::-1]
    figure = Figure(figsize=(7, 0.4 * len(names) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    colours = ["tab:gray" if name == BASELINE else "tab:blue" for name in names]
    bars = axes.barh(names, [results[name]["speed_up"] for name in names], color=colours)
    axes.bar_label(bars, fmt="%.2fx", padding=3)
    axes.set(xlabel="speed-up of the denoising loop", title=title)
    axes.margins(x=0.12)
    save_figure(figure, path)


def run(args: argparse.Namespace) -> None:
    require_patched_diffusers()
    if args.model != "sd2.1-base" and not Path(args.model).is_dir():
        raise UserError(f"--model {args.model}: there is no such directory; use sd2.1-base or a pipeline's directory")
    report = Report()
    output_dir = make_output_dir(args.output_dir)
    manager = choose_device(args, report)
    dtype = choose_dtype(args, manager, report)
    results = measure(args, manager, dtype)
    settings = {**vars(args), "device": str(manager.device), "dtype": str(dtype)}
    report.sections = {"settings": settings, "threads": torch.get_num_threads(), "results": results}
    report.write(output_dir / "benchmark.json")
    plot(
        results,
        f"{Path(args.model).name}, {args.steps} DDIM steps, {manager.device.type}",
        output_dir / "benchmark.png",
    )
    rows = [
        (name, [statistics.median(r["seconds"]), r["speed_up"], r["relative_error"]], ".3f")
        for name, r in results.items()
    ]
    print(format_table(["seconds", "speed-up", "latents differ by"], rows))
    print(f"benchmark.json and benchmark.png are in {output_dir}")


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        run(parse_arguments(arguments))


if __name__ == "__main__":
    main()
