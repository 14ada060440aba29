"""Schedules that scripts/schedules/find.py found for a model: which steps run the UNet whole, which a part of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from runners.cache_options import listed_options
from runners.cli import UserError, is_finite_number

FILE_NAME = "schedules.json"  # beside the model
VERSION = 1


class Schedule(NamedTuple):
    """One that was found for a row of --fast.

    Attributes:
        name: of the row.
        scheduler: class name.
        steps: of the scheduler.
        guidance_scale: up to which it was found good.
        full_steps, shallow_steps: numbers of calls; those in neither are forecast.
        psnr, psnr_worst_tenth: dB on pictures that it was not chosen by, to those of all steps; the mean, and the mean
            of the worst tenth.
        share: of the arithmetic of all steps.
    """

    name: str
    scheduler: str
    steps: int
    guidance_scale: float
    full_steps: list[int]
    shallow_steps: list[int]
    psnr: float
    psnr_worst_tenth: float
    share: float

    def options(self) -> dict[str, Any]:
        """The pipeline's arguments."""
        return listed_options(self.full_steps, self.shallow_steps)


def read_schedules(path: Path) -> list[Schedule]:
    """Raises UserError: there is no such file, or it is none of schedules."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise UserError(f"{path} is of version {content['version']}, and version {VERSION} is read here")
        schedules = [_checked(Schedule(**row)) for row in content["schedules"]]
        if len({schedule[:4] for schedule in schedules}) < len(schedules):
            raise ValueError("two are for the same name, scheduler, steps and guidance scale")
        return schedules
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"{path} is no file of schedules, as scripts/schedules/find.py writes them: {reason}"
        ) from error


def _checked(row: Schedule) -> Schedule:
    """Raises TypeError or ValueError: a field is none of its kind."""
    for name in ("name", "scheduler"):
        if not isinstance(getattr(row, name), str):
            raise TypeError(f"{name} must be text, not {getattr(row, name)!r}")
    for name in ("guidance_scale", "psnr", "psnr_worst_tenth", "share"):
        if not is_finite_number(getattr(row, name)):
            raise TypeError(f"{name} must be a number, not {getattr(row, name)!r}")
    for name in ("full_steps", "shallow_steps"):
        steps = getattr(row, name)
        if not isinstance(steps, list) or any(type(step) is not int for step in steps):
            raise TypeError(f"{name} must be a list of whole numbers, not {steps!r}")
    both = row.full_steps + row.shallow_steps
    if type(row.steps) is not int or len({*both}) < len(both):
        raise ValueError(f"steps must be a whole number and none of them listed twice: {row.steps!r}, {both}")
    if 0 not in row.full_steps or not all(0 <= step <= row.steps for step in both):  # PNDM has a call more than steps
        raise ValueError(f"the first of {row.steps} steps must be full, and none beyond the last listed: {both}")
    return row


def schedule_in(path: Path, name: str, scheduler: str, steps: int, guidance_scale: float) -> Schedule:
    """`choose_schedule` of a file. Raises UserError: nothing in it fits."""
    found = choose_schedule(read_schedules(path), name, scheduler, steps, guidance_scale)
    if found is None:
        raise UserError(
            f"--schedule {path} has none for --fast {name} with {scheduler}, --steps {steps} and "
            f"--guidance_scale {guidance_scale:g} or more: find one by scripts/schedules/find.py --rows {name} "
            f"--steps {steps} --guidance_scales {guidance_scale:g} --keep --output {path}, with --model_path and "
            "--schedulers as here, or leave --schedule out"
        )
    return found


def schedule_beside(folder: Path, name: str, scheduler: str, steps: int, guidance_scale: float) -> Schedule | None:
    """`choose_schedule` of the file in a model's folder; None without one."""
    path = folder / FILE_NAME
    return choose_schedule(read_schedules(path), name, scheduler, steps, guidance_scale) if path.is_file() else None


def choose_schedule(
    schedules: list[Schedule], name: str, scheduler: str, steps: int, guidance_scale: float
) -> Schedule | None:
    """The one for the least guidance that is not below `guidance_scale`; None where there is none."""
    fitting = [
        schedule
        for schedule in schedules
        if (schedule.name, schedule.scheduler, schedule.steps) == (name, scheduler, steps)
        and schedule.guidance_scale >= guidance_scale
    ]
    return min(fitting, key=lambda schedule: schedule.guidance_scale, default=None)
