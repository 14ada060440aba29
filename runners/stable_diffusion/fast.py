"""Which steps --fast takes: as found for the model, else by a rule."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from runners.cache_options import cache_options, fast_options
from runners.cli import UserError
from runners.model_dir import read_json
from runners.schedule_file import FILE_NAME, schedule_beside, schedule_in
from runners.schedulers import SCHEDULERS

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
    if args.schedule:
        return schedule_in(args.schedule, *asked).options(), {"row": args.fast, "schedule": str(args.schedule)}
    found = schedule_beside(args.model_path, *asked)
    if found:
        return found.options(), {"row": args.fast, "schedule": str(args.model_path / FILE_NAME)}
    return fast_options(args.fast, args.guidance_scale), {"row": args.fast, "schedule": DEFAULT}


def scheduler_of(folder: Path) -> str:
    """Class name of a model's own scheduler; empty where the folder does not say, which loading it will."""
    try:
        return read_json(folder / "scheduler" / "scheduler_config.json").get("_class_name", "")
    except UserError:
        return ""
