"""Each of Stable Diffusion's pipelines on the chip, with every acceleration, against the CPU in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ascend import compile_pipeline
from ascend.pipelines import parts_of
from processors import enable_fused_kernels, enable_token_merging
from tests.on_npu.helpers import SATURATES
from tests.tiny_pipelines import PIPELINES, draw, make_pipeline

HALF = torch.float16 if SATURATES else torch.bfloat16
# Of the latents' norm, after seven steps of a random model: several times what half precision leaves on the CPU.
TOLERANCE = {torch.float16: 0.02, torch.bfloat16: 0.12}[HALF]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a pipeline finds what another one has compiled: the same UNet, called in the same way."""
    return tmp_path_factory.mktemp("graphs")


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.cpu().float() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_with_fused_kernels_draws_the_cpus_picture(npu: torch.device, name: str) -> None:
    pipe = make_pipeline(name)
    expected = draw(pipe, name)
    pipe.to(npu, HALF)
    enable_fused_kernels(pipe)
    assert difference(draw(pipe, name), expected) < TOLERANCE


@pytest.mark.parametrize("name", PIPELINES)
def test_everything_as_graphs_is_everything_in_eager(npu: torch.device, name: str, graphs: Path) -> None:
    pipe = make_pipeline(name).to(npu, HALF)
    enable_fused_kernels(pipe)
    plain = draw(pipe, name).cpu().float()
    eager = draw(pipe, name, cache_interval=3).cpu().float()
    assert not torch.equal(eager, plain)
    backends = compile_pipeline(pipe, graphs)
    parts = parts_of(pipe)
    casts = {path for path in parts.each_picture if path.startswith("vae") and HALF in parts.casts_vae}
    assert {path for path, backend in backends.items() if backend == "eager"} == casts
    assert difference(draw(pipe, name, cache_interval=3), eager) < TOLERANCE


@pytest.mark.parametrize("name", PIPELINES)
def test_token_merging_draws_what_it_draws_on_the_cpu(npu: torch.device, name: str) -> None:
    """In float32, as rounding would change which tokens are alike. 310P multiplies float32 as float16."""
    pipe = make_pipeline(name)
    enable_token_merging(pipe, max_downsample=2)
    expected = draw(pipe, name, num_inference_steps=2)
    plain = draw(make_pipeline(name), name, num_inference_steps=2)
    merged = draw(pipe.to(npu), name, num_inference_steps=2)
    assert difference(merged, expected) < 0.5 * difference(plain, expected)
