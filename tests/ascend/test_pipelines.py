"""Each pipeline of `ascend.pipelines` with every acceleration, against itself without."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline

from ascend import compile_pipeline, decompile_pipeline, share_guidance, unshare_guidance
from ascend.graphs import compile as graphs
from ascend.parallel import Mesh
from ascend.pipelines import PIPELINES as ROWS
from ascend.pipelines import models_at, parts_of
from processors import disable_fused_kernels, enable_fused_kernels, enable_token_merging
from tests.ascend.graphs.test_static import Tracer
from tests.tiny_pipelines import PIPELINES, draw, make_pipeline


def test_each_row_is_of_a_pipeline_that_is_tested() -> None:
    hidream = {"HiDreamImagePipeline", "HiDreamImageEditingPipeline"}  # on_npu/test_hidream.py, pipeline_ranks.py
    assert set(ROWS) == {kind.__name__ for kind in PIPELINES.values()} | hidream


@pytest.mark.parametrize("name", PIPELINES)
def test_fused_kernels_draw_the_same_picture(name: str) -> None:
    pipe = make_pipeline(name)
    plain = draw(pipe, name)
    report = enable_fused_kernels(pipe)
    assert torch.equal(draw(pipe, name), plain)
    models = {key for key, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    assert set(report) == models and "not covered" not in " ".join(report.values())
    disable_fused_kernels(pipe)
    assert torch.equal(draw(pipe, name), plain)


@pytest.mark.parametrize("name", PIPELINES)
def test_token_merging_changes_little(name: str) -> None:
    pipe = make_pipeline(name)
    plain = draw(pipe, name)
    # The tiny SDXL has its attention at 1/2 of the latents' resolution and less, as the true one.
    report = enable_token_merging(pipe, ratio=0.5, max_downsample=2)
    merged = draw(pipe, name)
    assert not torch.equal(merged, plain) and "merge 50%" in report["unet"]
    assert (merged - plain).norm() < 0.5 * plain.norm()
    if name == "ControlNet":
        assert report["controlnet"].startswith("not covered")


@pytest.mark.parametrize("name", PIPELINES)
def test_everything_together_compiled_is_everything_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "make_backend", lambda *_: Tracer())
    pipe = make_pipeline(name)
    enable_fused_kernels(pipe)
    enable_token_merging(pipe, ratio=0.5, max_downsample=2)
    eager = draw(pipe, name, cache_interval=3)
    backends = compile_pipeline(pipe)
    assert {path for path, backend in backends.items() if backend == Tracer.name} == set(parts_of(pipe).each_step)
    torch.testing.assert_close(draw(pipe, name, cache_interval=3), eager, rtol=1e-4, atol=1e-4)
    decompile_pipeline(pipe)
    assert torch.equal(draw(pipe, name, cache_interval=3), eager)


@pytest.mark.parametrize("name", PIPELINES)
def test_what_is_shared_is_put_back(name: str) -> None:
    pipe = make_pipeline(name)
    shared = dict(models_at(pipe, parts_of(pipe).shared))
    before = {path: set(vars(module)) for path, module in shared.items()}
    share_guidance(pipe, Mesh(0, 2, 2, group=object()))
    assert all("forward" in vars(module) for module in shared.values())
    unshare_guidance(pipe)
    assert {path: set(vars(module)) for path, module in shared.items()} == before


def test_a_pipeline_without_a_row_is_refused() -> None:
    class Another(DiffusionPipeline):
        pass

    with pytest.raises(ValueError, match="Another is not known here, but StableDiffusionPipeline, "):
        compile_pipeline(Another())
