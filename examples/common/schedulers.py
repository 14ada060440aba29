"""Schedulers by the short names that users know."""

import diffusers
from diffusers import SchedulerMixin

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


def make_scheduler(name: str, like: SchedulerMixin) -> SchedulerMixin:
    """The scheduler called `name`, a key of SCHEDULERS, with the betas, prediction type and step offset of `like`."""
    return getattr(diffusers, SCHEDULERS[name]).from_config(like.config)
