"""Find where a model's denoising steps may be skipped, forecast or cheapened, for run_sd.py --fast.

    python scripts/schedules/find.py                                the demo model, into outputs/schedules
    python scripts/schedules/find.py --model_path DIR --prompts FILE --output DIR/schedules.json

For each guidance scale and each row of --fast, a few prompts are drawn with many schedules. A row's goal is the
closeness, to the pictures of all steps, that a known method reaches: quality that of DeepCache with interval 2,
balanced that of tomesd and DeepCache with 3, turbo that of tomesd and DeepCache with 5. Of the schedules that reach
the goal with 1 dB to spare on the first half of the prompts, the cheapest that does so on the other half as well is
taken, if it costs less than that method; what it reaches there is what the file promises. That much is to spare as
the worst tenth of 16 prompts is two pictures: with 128 prompts --margin 0.25 will do. A file beside a model is found
by --fast without --schedule; --keep adds to it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import SchedulerMixin, StableDiffusionPipeline

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from runners.cache_options import count_steps, listed_options
from runners.cli import ArgumentParser, UserError, file_path, finite_float, one_line_errors
from runners.files import make_output_dir, write_json
from runners.report import Report, format_table
from runners.schedule_file import FILE_NAME, VERSION, Schedule, read_schedules
from runners.schedulers import SCHEDULERS, check_steps, make_scheduler
from scripts.schedules.costs import Costs
from scripts.schedules.drawing import RATIO, Distance, Drawing, Method, distance, draw
from scripts.schedules.inputs import add_arguments, load, read_prompts_of

GOALS = {
    "quality": Method({"cache_interval": 2}),
    "balanced": Method({"cache_interval": 3}, ratio=RATIO),
    "turbo": Method({"cache_interval": 5}, ratio=RATIO),
}
FULL_STEPS = range(5, 26)
KEYS = ("name", "scheduler", "steps", "guidance_scale")  # of which a file has one schedule
BETWEEN = ("skip", "mixed", "shallow")


class Candidate(NamedTuple):
    full_steps: list[int]
    shallow_steps: list[int]
    share: float  # of the arithmetic of all steps

    def method(self) -> Method:
        return Method(listed_options(self.full_steps, self.shallow_steps))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="find.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, num_prompts="half to choose by, half to check by ", seed=0)
    add = parser.add_argument
    add("--schedulers", nargs="+", choices=SCHEDULERS, metavar="NAME", help="(the model's)")
    add("--rows", nargs="+", choices=GOALS, default=list(GOALS), metavar="NAME", help=f"({' '.join(GOALS)})")
    add(
        "--margin",
        type=finite_float,
        default=1.0,
        metavar="DB",
        help="to spare beyond the goal, as other prompts are further off (1)",
    )
    add(
        "--keep",
        action="store_true",
        help="what FILE has for other rows, schedulers, guidance scales and numbers of steps stays in it",
    )
    default = Path("outputs/schedules") / FILE_NAME
    add("--output", type=file_path, default=default, metavar="FILE", help=f"({default})")
    args = parser.parse_args(arguments)
    for name in ("guidance_scales", "schedulers", "rows"):  # a file has one schedule of each kind
        setattr(args, name, list(dict.fromkeys(getattr(args, name) or [])))
    if args.num_prompts < 2:
        parser.error("--num_prompts 1: there must be one to choose by and one to check by")
    return args


def candidates(pipe: StableDiffusionPipeline, args: argparse.Namespace, costs: Costs) -> list[Candidate]:
    """All that are tried, the cheapest first."""
    from diffusers.models.unets.deep_cache import get_full_steps, plan_between

    calls = sum(count_steps(pipe.scheduler, args.steps, listed_options([0], [])).values())
    found = {}
    for number in FULL_STEPS:
        full_steps = get_full_steps(calls, cache_schedule="early", cache_full_steps=number)
        for between in BETWEEN:
            shallow_steps = plan_between(calls, full_steps, between)
            if len(full_steps) < calls:
                listed = sorted(full_steps), sorted(shallow_steps)
                share = costs.share(pipe, args.steps, Method(listed_options(*listed)))
                found[full_steps, shallow_steps] = Candidate(*listed, share)
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
    pipe: StableDiffusionPipeline, args: argparse.Namespace, prompts: list[str], guidance_scale: float, report: Report
) -> Iterator[tuple[Schedule, dict[str, Any]]]:
    """For each row the schedule, and what was measured for it on both halves."""
    middle = len(prompts) // 2
    parts = {"choose": (prompts[:middle], args.seed), "check": (prompts[middle:], args.seed + middle)}
    choose, check = (
        Half(pipe, Drawing(part, seed, args.steps, guidance_scale, args.batch_size), what)
        for what, (part, seed) in parts.items()
    )
    config = pipe.unet.config
    costs = Costs(config, config.sample_size, guidance_scale > 1)
    tried = candidates(pipe, args, costs)
    chosen_by: dict[int, Distance] = {}
    for row in args.rows:
        name = f"{type(pipe.scheduler).__name__}, guidance {guidance_scale:g}, {row}"
        goals = [half.distance(GOALS[row], f"{name}, goal").raised(args.margin) for half in (choose, check)]
        cost = costs.share(pipe, args.steps, GOALS[row])
        for number, candidate in enumerate(candidate for candidate in tried if candidate.share < cost):
            if number not in chosen_by:
                chosen_by[number] = choose.distance(candidate.method(), f"{name}, {candidate.share:.3f}")
            if not chosen_by[number].reaches(goals[0]):
                continue
            checked = check.distance(candidate.method(), f"{name}, {candidate.share:.3f}")
            if checked.reaches(goals[1]):
                schedule = schedule_of(row, candidate, checked, pipe, args, guidance_scale)
                about = {key: getattr(schedule, key) for key in KEYS}
                yield schedule, about | {"chosen_by": chosen_by[number], "checked_by": checked, "goals": goals}
                break
        else:
            report.warn(f"{name}: no cheaper schedule reaches the goal, so none is written")


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


def read_kept(args: argparse.Namespace, schedulers: list[SchedulerMixin]) -> list[tuple[dict[str, Any], Any]]:
    """With --keep the schedules of the file that are not searched for now, each with what was measured for it.

    Raises UserError: there is no such file, or `find.py` did not write it.
    """
    if not args.keep:
        return []
    names = [type(scheduler).__name__ for scheduler in schedulers]
    searched = {*itertools.product(args.rows, names, [args.steps], args.guidance_scales)}
    schedules = [schedule._asdict() for schedule in read_schedules(args.output)]
    measured = json.loads(args.output.read_text(encoding="utf-8")).get("measured", [])
    if not isinstance(measured, list) or len(measured) != len(schedules):
        raise UserError(f"--keep: {args.output} does not say what was measured for each of its schedules")
    return [
        (schedule, details)
        for schedule, details in zip(schedules, measured, strict=True)
        if tuple(schedule[key] for key in KEYS) not in searched
    ]


def run(args: argparse.Namespace) -> None:
    prompts = read_prompts_of(args)
    make_output_dir(args.output.parent)
    if args.output.is_dir():
        raise UserError(f"--output {args.output} is a folder: name a file in it")
    report = Report()
    if len({*prompts}) <= len(prompts) // 2:
        report.warn(f"--prompts {args.prompts} has {len({*prompts})}: both halves draw them, with other seeds")
    pipe = load(args, report)
    schedulers = [make_scheduler(name, like=pipe.scheduler) for name in args.schedulers] or [pipe.scheduler]
    for scheduler in schedulers:
        check_steps(scheduler, args.steps)
        count_steps(scheduler, args.steps, listed_options([0], []))  # whether it takes forecasts
    found = read_kept(args, schedulers)
    settings = {name: getattr(args, name) for name in ("model_path", "prompts", "num_prompts", "seed", "margin")}
    settings |= {"device": str(pipe.device), "dtype": str(pipe.dtype)}
    rows = []
    for scheduler in schedulers:
        pipe.scheduler = scheduler
        for guidance_scale in args.guidance_scales:
            for schedule, measured in search(pipe, args, prompts, guidance_scale, report):
                found.append((schedule._asdict(), measured | {"found_with": settings}))
                numbers = [guidance_scale, len(schedule.full_steps), len(schedule.shallow_steps), schedule.share]
                numbers += [*measured["chosen_by"], *measured["checked_by"], *measured["goals"][1]]
                rows.append((f"{schedule.scheduler}, {schedule.name}", numbers, ".2f"))
                schedules, details = zip(*found, strict=True)
                content = {"version": VERSION, "schedules": schedules, "measured": details}
                write_json(args.output, content)  # at once, as the search takes long
    if not rows:
        raise UserError(
            f"no schedule reaches the goal of any row, so nothing is written to {args.output}: with more "
            "--num_prompts a smaller --margin will do, and with more --steps there is more to skip"
        )
    columns = [
        "guidance",
        "full",
        "shallow",
        "share",
        "chosen dB",
        "worst",
        "checked dB",
        "worst",
        "its goal dB",
        "worst",
    ]
    print(format_table(columns, rows))
    print(f"the schedules are in {args.output}, for run_sd.py --fast --schedule {args.output}")


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        run(parse_arguments(arguments))


if __name__ == "__main__":
    main()
