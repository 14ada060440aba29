"""Where a pipeline's components are, after whatever was done to it before, and that they take what was planned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from ascend import DeviceManager, memory_cleanup
from ascend.graphs.compile import compile_pipeline
from ascend.placement import place_pipeline
from ascend.planner import PlanError, Request, apply_plan, plan_memory
from ascend.planner.activity import LENT, RESIDENT, STREAMED
from ascend.planner.memory_plan import modules_of, part_of
from ascend.planner.models import to_meta
from ascend.planner.plan import STILL, make_plan
from processors import enable_fused_kernels
from tests.tiny_pipelines import make_pipeline

HALF = torch.float16
SIZE = Request(64, 64)
WHOLE = "all components are on npu:0"


@pytest.fixture
def large_sd(tiny_sd: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """In float16, with a text encoder of 40 MiB, beside which a segment of the allocator is little."""
    config = CLIPTextModel.config_class(**tiny_sd.text_encoder.config.to_dict())
    config.num_hidden_layers, config.intermediate_size = 10, 2**15
    tiny_sd.text_encoder = CLIPTextModel(config).eval()
    return tiny_sd.to(HALF, silence_dtype_warnings=True)


def devices(pipe: DiffusionPipeline) -> set[str]:
    return {parameter.device.type for model in modules_of(pipe).values() for parameter in model.parameters()}


def draw(pipe: DiffusionPipeline, size: int = 64) -> torch.Tensor:
    options = {"height": size, "width": size, "num_inference_steps": 1, "output_type": "pt"}
    return pipe("a cat", generator=torch.Generator().manual_seed(0), **options).images


def enough_for_all(pipe: DiffusionPipeline, device: torch.device) -> int:
    return plan_memory(pipe, device, SIZE, HALF, mode="resident", limit=2**40).required


def test_a_pipeline_is_placed_anew_whatever_was_done_before(
    npu: torch.device, large_sd: StableDiffusionPipeline
) -> None:
    memory_cleanup()
    others = torch.npu.memory_reserved(npu)  # of what ran before in this process
    enough = enough_for_all(large_sd, npu)
    place_pipeline(large_sd, npu)
    expected = draw(large_sd)
    for limit, is_whole in ((enough, True), (enough // 2, False), (enough // 2, False), (None, True)):
        done = place_pipeline(large_sd, npu, SIZE, limit)
        assert (done == [WHOLE]) == is_whole == (devices(large_sd) == {"npu"})
        if not is_whole:
            assert any(line.startswith("text_encoder: streamed (") for line in done)
            assert done[-1] == "the VAE decodes one picture at a time" and large_sd.vae.use_slicing
        memory_cleanup()
        torch.npu.reset_peak_memory_stats(npu)
        assert torch.equal(draw(large_sd), expected)
        assert limit is None or torch.npu.max_memory_reserved(npu) - others <= limit
    assert place_pipeline(large_sd, torch.device("cpu")) == ["all components are on cpu"]
    assert devices(large_sd) == {"cpu"}


def test_what_is_not_known_of_a_pipeline_is_said(npu: torch.device, large_sd: StableDiffusionPipeline) -> None:
    large_sd.register_modules(safety_checker=CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=1)).to(HALF))
    enough = enough_for_all(large_sd, npu)
    left = "30% of the memory are left for what the safety_checker takes beside its weights: how pipelines call"
    *streamed, line = place_pipeline(large_sd, npu, SIZE, enough)
    assert line.startswith(left) and any(words.startswith("text_encoder: streamed (") for words in streamed)
    whole, line = place_pipeline(large_sd, npu, SIZE, int(1.5 * enough))
    assert whole == WHOLE and line.startswith(left)


def test_what_does_not_fit_at_all_is_said(npu: torch.device, tiny_sd: StableDiffusionPipeline) -> None:
    with pytest.raises(PlanError, match="no placement fits"):
        place_pipeline(tiny_sd, npu, limit=2**20)


def test_a_compiled_pipeline_is_not_moved_away_from_its_graphs(
    npu: torch.device, large_sd: StableDiffusionPipeline, tmp_path: Path
) -> None:
    refused = "those of the .* cannot, as it is compiled or shared: place the pipeline"
    enough = enough_for_all(large_sd, npu)
    large_sd.to(npu)
    compile_pipeline(large_sd, tmp_path)
    assert place_pipeline(large_sd, npu, SIZE, enough) == [WHOLE]
    with pytest.raises(RuntimeError, match=refused):
        place_pipeline(large_sd, npu, SIZE, enough // 2)
    with pytest.raises(RuntimeError, match=refused):
        place_pipeline(large_sd, torch.device("cpu"))
    assert devices(large_sd) == {"npu"}


def test_what_the_pipeline_has_of_the_device_is_its_own_to_plan_with(
    npu: torch.device, large_sd: StableDiffusionPipeline
) -> None:
    def limit() -> int:
        memory_cleanup()
        return plan_memory(large_sd, npu, SIZE, HALF).limit

    before = limit()
    large_sd.to(npu)
    assert abs(limit() - before) < 20 * 2**20  # but for what segments have around tensors


@pytest.mark.parametrize("where", [RESIDENT, LENT, STREAMED])
def test_a_vae_that_sdxl_casts_takes_what_was_planned(npu: torch.device, where: str) -> None:
    manager, pipe, size = DeviceManager(npu), make_pipeline("SDXL"), 64
    pipe.to(HALF, silence_dtype_warnings=True)
    bare = {name: to_meta(model) for name, model in modules_of(pipe).items()}
    parts = [part_of(name, bare, Request(size, size), HALF, fused_attention=True) for name in bare]
    choice = tuple(where if part.name == "vae" else RESIDENT for part in parts)
    plan = make_plan(parts, choice, 2**40, 1, STILL)
    before = manager.memory_stats()["allocated"]
    apply_plan(pipe, plan, npu)
    enable_fused_kernels(pipe)
    pipe.vae.decoder.register_forward_pre_hook(lambda *_: manager.reset_peak_memory())
    draw(pipe, size)
    assert pipe.vae.dtype == HALF
    assert plan.phases["decode"] == pytest.approx(manager.memory_stats()["peak"] - before, rel=0.05)
