"""An argument that a pipeline has no use for is an error that names it."""

import ast
import inspect
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLInpaintPipeline,
)

PIPELINES = Path(inspect.getfile(diffusers)).parent / "pipelines"


@pytest.mark.parametrize(
    "sister",
    [
        StableDiffusionControlNetInpaintPipeline,
        StableDiffusionUpscalePipeline,
        StableDiffusionXLControlNetPipeline,
        StableDiffusionXLInpaintPipeline,
    ],
)
def test_a_pipeline_without_caching_refuses_its_arguments(sister: type[DiffusionPipeline]) -> None:
    pipe = sister.__new__(sister)
    message = rf"{sister.__name__}.__call__\(\) got an unexpected keyword argument 'cache_interval'"
    with pytest.raises(TypeError, match=message):
        pipe(prompt="a cat", cache_interval=3)


def test_a_misspelt_argument_is_an_error_that_says_the_right_one(tiny_sd: StableDiffusionPipeline) -> None:
    with pytest.raises(TypeError, match=r"argument 'cache_intervall'. Did you mean 'cache_interval'\?"):
        tiny_sd("a cat", cache_intervall=3)
    with pytest.raises(TypeError, match=r"argument 'guidance'. Did you mean 'guidance_scale'\?"):
        tiny_sd("a cat", guidance=3)


def test_the_deprecated_callback_is_still_taken(tiny_sd: StableDiffusionPipeline) -> None:
    steps: list[int] = []

    def callback(step: int, timestep: torch.Tensor, latents: torch.Tensor) -> None:
        steps.append(step)

    tiny_sd("a cat", num_inference_steps=2, callback=callback, callback_steps=1, output_type="latent")
    assert steps == [0, 1]


def calls_with_the_deprecated_callback() -> dict[str, str]:
    """The source of each `__call__` that takes `callback` among its `**kwargs`, by the name of its pipeline."""
    return {
        cls.name: ast.unparse(call)
        for path in PIPELINES.rglob("*.py")
        for cls in ast.parse(path.read_text("utf-8")).body
        if isinstance(cls, ast.ClassDef)
        for call in cls.body
        if isinstance(call, ast.FunctionDef)
        and call.name == "__call__"
        and "kwargs.pop('callback'" in ast.unparse(call)
    }


def test_every_pipeline_that_takes_the_deprecated_callback_refuses_the_rest() -> None:
    calls = calls_with_the_deprecated_callback()
    assert len(calls) >= 30
    assert [name for name, source in calls.items() if "_refuse_unknown_arguments(kwargs)" not in source] == []
