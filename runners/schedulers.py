"""Schedulers by the short names that users know, and whether one can take as many steps as the user wants."""

import copy
import inspect
import warnings

import diffusers
import torch
from diffusers import SchedulerMixin

from runners.cli import UserError

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "kdpm2": "KDPM2DiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
# Where `like` does not say, as the classes' own do not suit Stable Diffusion: predicted samples would be clipped to
# the range of pixels, beyond which latents go, and PNDM would begin with twelve calls of a Runge-Kutta method.
DEFAULTS = {"clip_sample": False, "skip_prk_steps": True}


def make_scheduler(name: str, like: SchedulerMixin) -> SchedulerMixin:
    """The scheduler called `name`, a key of SCHEDULERS, with the betas, prediction type and step offset of `like`."""
    kind = getattr(diffusers, SCHEDULERS[name])
    parameters = inspect.signature(kind).parameters
    said = like.config.keys() - set(like.config.get("_use_default_values", []))
    unsaid = {key: value for key, value in DEFAULTS.items() if key in parameters and key not in said}
    return kind.from_config(like.config, **unsaid)


def check_steps(scheduler: SchedulerMixin, steps: int) -> None:
    """Raise UserError unless `scheduler` can take `steps` steps. It is left as it was."""
    name, trained = type(scheduler).__name__, scheduler.config.num_train_timesteps
    if steps > trained:
        raise UserError(f"--steps {steps}: the model was trained with {trained}, which is the most that it can take")
    fault = _walk(scheduler, steps)
    if fault is None:
        return
    others = [number for distance in range(1, 5) for number in (steps - distance, steps + distance)]
    near = [number for number in others if 1 <= number <= trained and _walk(scheduler, number) is None]
    hint = f"; {near[0]} would do" if near else ""
    raise UserError(f"--steps {steps}: {name} with this model's settings cannot take that number ({fault}){hint}")


def _walk(scheduler: SchedulerMixin, steps: int) -> str | None:
    """Take all steps on a sample of one number. What went wrong, or None.

    Each scheduler has limits of its own, in the size of its tables and in how many steps a higher order needs, and
    most show in the loop only: past the end of a table, some in the last step, after everything has been computed.
    """
    scheduler = copy.deepcopy(scheduler)
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    sample = torch.ones(1, 1, 1, 1)
    try:
        with warnings.catch_warnings(action="ignore"):  # numpy's of numbers that are not finite
            scheduler.set_timesteps(steps)
            for timestep in scheduler.timesteps:
                prediction = scheduler.scale_model_input(sample, timestep)
                sample = scheduler.step(prediction, timestep, sample, **options).prev_sample
    except (ArithmeticError, AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}".removesuffix(": ")
    return None if sample.isfinite().all() else "the result is not finite"
