"""--DC, --cache_schedule, --forecast and --fast: which steps run the whole UNet, which a part, which none."""

import argparse
from collections.abc import Mapping
from typing import Any

from diffusers import SchedulerMixin

from runners.cli import UserError, finite_float, positive_int

DEFAULT_INTERVAL = 3
BETWEEN = ("shallow", "mixed", "skip")
# Of --fast: how many steps are full ones, up to this guidance and beyond it. The stronger the guidance is, the less of
# the early steps can be forecast. examples/sd2.1/README.md has what each row costs and what it changes.
MODERATE_GUIDANCE = 4.0
FAST = {"quality": (14, 18), "balanced": (10, 14), "turbo": (8, 10)}


def cache_interval(text: str) -> int:
    interval = positive_int(text)
    if interval == 1:
        raise argparse.ArgumentTypeError("must be 2 or more: with 1 every step is a full one")
    return interval


def cache_schedule(text: str) -> dict[str, Any]:
    """The pipeline's arguments for `uniform`, `quadratic[:15[,1.4]]`, `early[:12]` or `0,4,8`."""
    name, _, details = text.partition(":")
    try:
        if name == "uniform" and not details:
            return {"cache_schedule": name}
        if name == "early":
            return {"cache_schedule": name} | ({"cache_full_steps": int(details)} if details else {})
        if name == "quadratic":
            options: dict[str, Any] = {"cache_schedule": name}
            if details:
                centre, _, power = details.partition(",")
                options["cache_center"] = int(centre)
                if power:
                    options["cache_power"] = finite_float(power)
            return options
        return {"cache_schedule": [int(step) for step in text.split(",")]}
    except (ValueError, argparse.ArgumentTypeError):
        message = f"must be uniform, quadratic[:CENTRE[,POWER]], early[:STEPS] or step numbers 0,4,8, not '{text}'"
        raise argparse.ArgumentTypeError(message) from None


def cache_options(interval: int | None, schedule: dict[str, Any] | None, between: str | None = None) -> dict[str, Any]:
    """The pipeline's arguments for --DC, --cache_schedule and --forecast together; empty without them.

    `interval` is None without --DC and 0 for --DC without a number; `between` is None without --forecast.
    """
    schedule = schedule or {}
    forecast = {} if between is None else {"cache_forecast": True, "cache_between": between}
    name = schedule.get("cache_schedule")
    if isinstance(name, list) or name == "early":
        if interval:
            what = "lists" if isinstance(name, list) else "counts"
            raise UserError(f"--DC {interval} has no meaning beside a --cache_schedule that {what} the full steps")
        return schedule | forecast
    if interval is None:
        if schedule:
            raise UserError(f"--cache_schedule {name} needs --DC")
        if forecast:
            raise UserError("--forecast needs --DC, or a --cache_schedule that says which steps are full ones")
        return {}
    return {"cache_interval": interval or DEFAULT_INTERVAL, **schedule, **forecast}


def fast_options(name: str, guidance_scale: float) -> dict[str, Any]:
    """The pipeline's arguments for the row `name` of FAST."""
    full_steps = FAST[name][guidance_scale > MODERATE_GUIDANCE]
    forecast = {"cache_forecast": True, "cache_between": "mixed"}
    return {"cache_schedule": "early", "cache_full_steps": full_steps, **forecast}


def listed_options(full_steps: list[int], shallow_steps: list[int]) -> dict[str, Any]:
    """The pipeline's arguments for these numbers of calls; those in neither are forecast."""
    return {"cache_schedule": full_steps, "cache_forecast": True, "cache_between": shallow_steps}


def unet_times(scheduler: SchedulerMixin, steps: int, skipped: int = 0) -> list[Any]:
    """The timesteps of the UNet's calls: some schedulers call once more than there are steps, or twice as often.

    `skipped` are the first of the `steps`, which are not taken where a picture is changed.
    """
    scheduler.set_timesteps(steps)
    return scheduler.timesteps[skipped * scheduler.order :].tolist()


def count_steps(scheduler: SchedulerMixin, steps: int, options: Mapping[str, Any], skipped: int = 0) -> dict[str, int]:
    """How many steps run the UNet whole, in its outer layers and not at all, with `options` from `cache_options`.

    Without options all `steps` are full ones. `skipped` is as for `unet_times`.

    Raises:
        UserError: the schedule does not fit `steps` or `scheduler`, or saves nothing.
    """
    if not options:
        return {"full_steps": steps, "shallow_steps": 0, "skipped_steps": 0}
    # Of the fork, whose absence is said later
    from diffusers.models.unets.deep_cache import get_full_steps, plan_between
    from diffusers.models.unets.forecast_solver import ForecastSolver

    times = unet_times(scheduler, steps, skipped)
    schedule = dict(options)
    between = schedule.pop("cache_between", "shallow")
    forecast = schedule.pop("cache_forecast", False)
    try:
        calls = len(ForecastSolver(scheduler, times, {}).calls if forecast else times)
    except ValueError as error:
        raise UserError(
            f"--forecast and --fast: {error} Take another --scheduler, as ddim or dpm++, or --DC alone."
        ) from error
    try:
        full_steps = get_full_steps(calls, **schedule)
        shallow_steps = plan_between(calls, full_steps, between)
    except ValueError as error:
        raise UserError(f"{_flag_of(options)}: {error}") from error
    if len(full_steps) == calls:
        raise UserError(
            f"{_flag_of(options)} has no effect: all {calls} steps would be full ones; take more --steps, or leave it "
            "out"
        )
    skipped_steps = calls - len(full_steps) - len(shallow_steps)
    return {"full_steps": len(full_steps), "shallow_steps": len(shallow_steps), "skipped_steps": skipped_steps}


def _flag_of(options: Mapping[str, Any]) -> str:
    return "--fast, --forecast or --cache_schedule" if options.get("cache_forecast") else "--DC or --cache_schedule"
