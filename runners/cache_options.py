"""--DC and --cache_schedule: which denoising steps run the whole UNet and which reuse deep features (DeepCache)."""

import argparse
from typing import Any

from diffusers import SchedulerMixin

from runners.cli import UserError, positive_int

DEFAULT_INTERVAL = 3


def cache_interval(text: str) -> int:
    interval = positive_int(text)
    if interval == 1:
        raise argparse.ArgumentTypeError("must be 2 or more: with 1 every step is a full one")
    return interval


def cache_schedule(text: str) -> dict[str, Any]:
    """The pipeline's arguments for `uniform`, `quadratic`, `quadratic:15`, `quadratic:15,1.4` or `0,4,8`."""
    name, _, details = text.partition(":")
    try:
        if name == "uniform" and not details:
            return {"cache_schedule": name}
        if name == "quadratic":
            options: dict[str, Any] = {"cache_schedule": name}
            if details:
                centre, _, power = details.partition(",")
                options["cache_center"] = int(centre)
                if power:
                    options["cache_power"] = float(power)
            return options
        return {"cache_schedule": [int(step) for step in text.split(",")]}
    except ValueError:
        message = f"must be uniform, quadratic[:CENTRE[,POWER]] or step numbers 0,4,8, not '{text}'"
        raise argparse.ArgumentTypeError(message) from None


def cache_options(interval: int | None, schedule: dict[str, Any] | None) -> dict[str, Any]:
    """The pipeline's arguments for --DC and --cache_schedule together; empty without them.

    `interval` is None without --DC and 0 for --DC without a number.
    """
    schedule = schedule or {}
    if isinstance(schedule.get("cache_schedule"), list):
        if interval:
            raise UserError(f"--DC {interval} has no meaning beside a --cache_schedule that lists the full steps")
        return schedule
    if interval is None:
        if schedule:
            raise UserError(f"--cache_schedule {schedule['cache_schedule']} needs --DC")
        return {}
    return {"cache_interval": interval or DEFAULT_INTERVAL, **schedule}


def count_full_steps(
    scheduler: SchedulerMixin, steps: int, options: dict[str, Any], skipped: int = 0
) -> dict[str, int]:
    """How many calls of the UNet run it whole and how many not, with `options` from `cache_options`.

    `skipped` are the first of the `steps`, which are not taken where a picture is changed.

    Raises:
        UserError: the schedule does not fit `steps` or saves nothing.
    """
    from diffusers.models.unets.deep_cache import get_full_steps  # which the patches add

    scheduler.set_timesteps(steps)
    # Some schedulers call once more than there are steps, or twice as often.
    calls = len(scheduler.timesteps) - skipped * scheduler.order
    try:
        full_steps = len(get_full_steps(calls, **options))
    except ValueError as error:
        raise UserError(f"--cache_schedule: {error}") from error
    if full_steps == calls:
        raise UserError(f"DeepCache has no effect: all {calls} steps are full ones with {options}")
    return {"full_steps": full_steps, "shallow_steps": calls - full_steps}
