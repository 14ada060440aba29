"""Find where a model's denoising steps may be skipped, forecast or cheapened, for run_sd.py --fast.

    python scripts/schedules/find.py                                the demo model, into outputs/schedules
    python scripts/schedules/find.py --model_path DIR --prompts FILE --output DIR/schedules.json

For each guidance scale and each row of --fast, a few prompts are drawn with many schedules. A row's goal is the
closeness, to the pictures of all steps, that a known method reaches: quality that of DeepCache with interval 3,
balanced that of tomesd and DeepCache with 3, turbo that of tomesd and DeepCache with 5. Of the schedules that reach
the goal on the first half of the prompts, the cheapest that reaches it on the other half as well is taken; what it
reaches there is what the file promises. A file beside a model is found by --fast without --schedule.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusionPipeline

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from runners.cache_options import count_steps
from runners.cli import (
    ArgumentParser,
    UserError,
    file_path,
    finite_float,
    non_negative_int,
    one_line_errors,
    positive_int,
    read_prompts,
)
from runners.devices import add_device_arguments, choose_device, choose_dtype
from runners.files import write_json
from runners.model_dir import load_pipeline, require_patched_diffusers
from runners.report import Report, format_table
from runners.schedule_file import FILE_NAME, VERSION, Schedule
from runners.schedulers import SCHEDULERS, make_scheduler
from runners.unet_cost import step_flops
from scripts.demo_model.scenes import held_out_scenes
from scripts.schedules.drawing import Distance, Drawing, Method, distance, draw

DEMO_MODEL = ROOT / "examples/sd2.1/demo_model"
RATIO = 0.5
GOALS = {
    "quality": Method({"cache_interval": 3}),
    "balanced": Method({"cache_interval": 3}, ratio=RATIO),
    "turbo": Method({"cache_interval": 5}, ratio=RATIO),
}
FULL_STEPS = range(6, 22)
BETWEEN = ("skip", "mixed", "shallow")


class Candidate(NamedTuple):
    full_steps: list[int]
    shallow_steps: list[int]
    share: float  # of the arithmetic of all steps

    def method(self) -> Method:
        options = {"cache_schedule": self.full_steps, "cache_forecast": True, "cache_between": self.shallow_steps}
        return Method(options)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="find.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what to draw").add_argument
    add("--model_path", type=file_path, default=DEMO_MODEL, metavar="DIR", help="(the demo model)")
    add(
        "--prompts", type=file_path, metavar="FILE", help="UTF-8 text, a prompt on each line (the demo model's scenes)"
    )
    add("--num_prompts", type=positive_int, default=32, metavar="N", help="half to choose by, half to check by (32)")
    add("--steps", type=positive_int, default=50, metavar="N", help="(50)")
    add("--scheduler", choices=SCHEDULERS, metavar="NAME", help="(the model's)")
    add("--guidance_scales", type=finite_float, nargs="+", default=[1.5, 4.0, 7.5], metavar="G", help="(1.5 4 7.5)")
    add("--rows", nargs="+", choices=GOALS, default=list(GOALS), metavar="NAME", help=f"({' '.join(GOALS)})")
    add("--seed", type=non_negative_int, default=0, metavar="N", help="of the first picture (0)")
    add("--batch_size", type=positive_int, default=16, metavar="N", help="pictures made together (16)")
    add_device_arguments(parser)
    default = Path("outputs/schedules") / FILE_NAME
    parser.add_argument_group("output").add_argument(
        "--output", type=file_path, default=default, metavar="FILE", help=f"({default})"
    )
    args = parser.parse_args(arguments)
    if args.num_prompts < 2:
        parser.error("--num_prompts 1: there must be one to choose by and one to check by")
    if not args.prompts and args.model_path.resolve() != DEMO_MODEL:
        parser.error("--model_path needs --prompts, which the model was trained for")
    return args


def prompts_of(args: argparse.Namespace) -> list[str]:
    if not args.prompts:
        return [scene.caption() for scene in held_out_scenes(args.num_prompts, args.seed)]
    prompts = read_prompts(args.prompts)
    if len(prompts) < args.num_prompts:
        raise UserError(f"--prompts {args.prompts} has {len(prompts)} prompts of the --num_prompts {args.num_prompts}")
    return prompts[: args.num_prompts]


def candidates(pipe: StableDiffusionPipeline, args: argparse.Namespace, guidance_scale: float) -> list[Candidate]:
    """All that are tried, the cheapest first."""
    from diffusers.models.unets.deep_cache import get_full_steps, plan_between

    guided = guidance_scale > 1
    config = pipe.unet.config
    full, shallow = step_flops(config, 2 if guided else 1, config.sample_size, config.sample_size)
    part = (step_flops(config, 1, config.sample_size, config.sample_size)[1] if guided else shallow) / full
    options = {"cache_schedule": [0], "cache_forecast": True}
    calls = sum(count_steps(pipe.scheduler, args.steps, options).values())
    found = {}
    for number in FULL_STEPS:
        full_steps = get_full_steps(calls, cache_schedule="early", cache_full_steps=number)
        for between in BETWEEN:
            shallow_steps = plan_between(calls, full_steps, between)
            share = (len(full_steps) + part * len(shallow_steps)) / calls
            if len(full_steps) < calls:
                found[full_steps, shallow_steps] = Candidate(sorted(full_steps), sorted(shallow_steps), share)
    return sorted(found.values(), key=lambda candidate: candidate.share)


class Half:
    """Half of the prompts, with the pictures of all steps."""

    def __init__(self, pipe: StableDiffusionPipeline, drawing: Drawing, what: str) -> None:
        self.pipe, self.drawing, self.what = pipe, drawing, what
        self.reference = draw(pipe, drawing, Method(), f"all steps, {what}")

    def distance(self, method: Method, name: str) -> Distance:
        pictures = draw(self.pipe, self.drawing, method, f"{name}, {self.what}")
        return distance(pictures, self.reference)


def search(
    pipe: StableDiffusionPipeline, args: argparse.Namespace, guidance_scale: float
) -> Iterator[tuple[Schedule, dict[str, Any]]]:
    """For each row the schedule, and what was measured for it on both halves."""
    prompts = prompts_of(args)
    middle = len(prompts) // 2
    parts = {"choose": (prompts[:middle], args.seed), "check": (prompts[middle:], args.seed + middle)}
    choose, check = (
        Half(pipe, Drawing(part, seed, args.steps, guidance_scale, args.batch_size), what)
        for what, (part, seed) in parts.items()
    )
    tried = candidates(pipe, args, guidance_scale)
    chosen_by: dict[int, Distance] = {}
    for row in args.rows:
        goals = [half.distance(GOALS[row], f"goal of {row}") for half in (choose, check)]
        for number, candidate in enumerate(tried):
            name = f"guidance {guidance_scale:g}, {row}, {candidate.share:.3f}"
            if number not in chosen_by:
                chosen_by[number] = choose.distance(candidate.method(), name)
            if not chosen_by[number].reaches(goals[0]):
                continue
            checked = check.distance(candidate.method(), name)
            if checked.reaches(goals[1]):
                measured = {"chosen_by": chosen_by[number], "checked_by": checked, "goals": goals}
                yield schedule_of(row, candidate, checked, pipe, args, guidance_scale), measured
                break
        else:
            raise UserError(f"--guidance_scales {guidance_scale:g}: no schedule reaches the goal of {row}")


def schedule_of(
    row: str,
    candidate: Candidate,
    checked: Distance,
    pipe: StableDiffusionPipeline,
    args: argparse.Namespace,
    guidance_scale: float,
) -> Schedule:
    return Schedule(
        name=row,
        scheduler=type(pipe.scheduler).__name__,
        steps=args.steps,
        guidance_scale=guidance_scale,
        full_steps=candidate.full_steps,
        shallow_steps=candidate.shallow_steps,
        psnr=round(checked.psnr, 2),
        psnr_worst_tenth=round(checked.worst_tenth, 2),
        share=round(candidate.share, 4),
    )


def run(args: argparse.Namespace) -> None:
    require_patched_diffusers()
    report = Report()
    manager = choose_device(args, report)
    dtype = choose_dtype(args, manager, report)
    pipe = load_pipeline(StableDiffusionPipeline, args.model_path, dtype).to(manager.device)
    pipe.set_progress_bar_config(disable=True)
    if args.scheduler:
        pipe.scheduler = make_scheduler(args.scheduler, like=pipe.scheduler)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    schedules, rows, details = [], [], []
    with torch.no_grad():
        for guidance_scale in args.guidance_scales:
            for schedule, measured in search(pipe, args, guidance_scale):
                schedules.append(schedule._asdict())
                details.append({name: measured[name] for name in measured} | {"guidance_scale": guidance_scale})
                numbers = [guidance_scale, len(schedule.full_steps), len(schedule.shallow_steps), schedule.share]
                numbers += [*measured["chosen_by"], *measured["checked_by"], *measured["goals"][1]]
                rows.append((schedule.name, numbers, ".2f"))
    settings = {"prompts": args.num_prompts, "seed": args.seed, "device": str(manager.device), "dtype": str(dtype)}
    write_json(args.output, {"version": VERSION, "schedules": schedules, "found_with": settings, "measured": details})
    columns = ["guidance", "full", "shallow", "share", "chosen dB", "worst", "checked dB", "worst", "goal dB", "worst"]
    print(format_table(columns, rows))
    print(f"the schedules are in {args.output}")


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        run(parse_arguments(arguments))


if __name__ == "__main__":
    main()
