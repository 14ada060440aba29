"""Which steps --fast takes: as found for the model, else by a rule."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from runners.cache_options import cache_options, fast_options
from runners.cli import UserError
from runners.model_dir import INDEX, read_json
from runners.schedule_file import FILE_NAME, schedule_beside, schedule_in
from runners.schedulers import SCHEDULERS
from runners.stable_diffusion.inputs import steps_drawn

DEFAULT = "by guidance"


def choose_cache(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str] | None]:
    """The pipeline's arguments for --DC, --cache_schedule, --forecast, --fast and --schedule; empty without them.

    Beside them what --fast took: its row, and the file that has the steps, or DEFAULT; None without --fast.

    Raises:
        UserError: two of them say the same, or no schedule in --schedule fits.
    """
    if args.fast is None:
        if args.schedule:
            raise UserError(f"--schedule {args.schedule} has no effect without --fast, whose steps it says")
        return cache_options(args.DC, args.cache_schedule, args.forecast), None
    for name in ("DC", "cache_schedule", "forecast"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name} has no meaning beside --fast, which chooses the steps itself")
    scheduler = SCHEDULERS[args.scheduler] if args.scheduler else scheduler_of(args.config or args.model_path)
    asked = args.fast, scheduler, args.steps, args.guidance_scale
    # Of a picture that is changed the first steps are not taken, and schedules number them all.
    skipped = args.steps - steps_drawn(args)
    if args.schedule:
        if skipped:
            raise UserError(
                f"--schedule {args.schedule} is for all --steps, and --image with --strength {args.strength:g} skips "
                f"{skipped} of them: leave --schedule out, and --fast goes by guidance"
            )
        if not scheduler:
            raise UserError(
                f"--schedule {args.schedule} has steps for each scheduler, and which one {args.model_path} has is not "
                "known before it is loaded: name it by --scheduler, or its configuration by --config"
            )
        return schedule_in(args.schedule, *asked).options(), {"row": args.fast, "schedule": str(args.schedule)}
    found = None if skipped else schedule_beside(args.model_path, *asked)
    if found:
        return found.options(), {"row": args.fast, "schedule": str(args.model_path / FILE_NAME)}
    return fast_options(args.fast, args.guidance_scale), {"row": args.fast, "schedule": DEFAULT}


def scheduler_of(folder: Path) -> str:
    """Class name of a model's own scheduler; empty where the folder does not say it well, which loading it will."""
    try:
        _, name = read_json(folder / INDEX)["scheduler"]
    except (UserError, KeyError, TypeError, ValueError):
        return ""
    return str(name)


def describe_fast(args: argparse.Namespace) -> str:
    """What --fast takes, in one line, once `args.cache_steps` is counted."""
    counted, found = args.cache_steps, args.fast_row
    return (
        f"--fast {found['row']}: {counted['full_steps']} full steps, {counted['shallow_steps']} shallow ones, "
        f"{counted['skipped_steps']} forecast whole; steps {'' if found['schedule'] == DEFAULT else 'of '}"
        f"{found['schedule']}"
    )
