import copy
from collections.abc import Callable
from pathlib import Path

import fork
import pytest
from diffusers import StableDiffusionPipeline


@pytest.fixture(scope="session")
def upstream_wheel() -> Path:
    """The wheel that the patches are for, which building the fork has left in the cache."""
    return fork.upstream_wheel(fork.read_pin())


@pytest.fixture
def make_tiny_sd(tiny_sd: StableDiffusionPipeline) -> Callable[[], StableDiffusionPipeline]:
    """Makes pipelines like `tiny_sd` with a UNet of their own, for tests that change one and compare it with another."""

    def make() -> StableDiffusionPipeline:
        parts = tiny_sd.components | {"unet": copy.deepcopy(tiny_sd.unet)}
        pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make
