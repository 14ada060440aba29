"""Pipelines brought to a device, whatever was done to them before; on chips, `tests/on_npu/test_placement.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from ascend.graphs.compile import compile_pipeline, is_compiled
from ascend.placement import place_pipeline
from ascend.planner import Request, apply_plan, plan_memory
from ascend.streaming import stream_module

CPU = torch.device("cpu")
WHOLE = ["all components are on cpu"]


def draw(pipe: StableDiffusionPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(["a", "b"], num_inference_steps=1, generator=generator, output_type="pt").images


def has_hooks(pipe: StableDiffusionPipeline) -> bool:
    return any(hasattr(part, "_hf_hook") for model in (pipe.unet, pipe.vae) for part in model.modules())


def test_a_pipeline_that_fits_is_placed_whole_and_keeps_its_picture(tiny_sd: StableDiffusionPipeline) -> None:
    plain = draw(tiny_sd)
    assert place_pipeline(tiny_sd, CPU) == WHOLE
    assert torch.equal(draw(tiny_sd), plain)
    assert not tiny_sd.vae.use_slicing


def test_a_pipeline_without_a_vae_is_placed_too(tiny_sd: StableDiffusionPipeline) -> None:
    tiny_sd.vae = None
    assert place_pipeline(tiny_sd, CPU) == WHOLE


def test_streaming_is_undone_of_parts_of_components_too(tiny_sd: StableDiffusionPipeline) -> None:
    plain = draw(tiny_sd)
    apply_plan(tiny_sd, plan_memory(tiny_sd, CPU, Request(64, 64), torch.float32, mode="stream", limit=2**30), CPU)
    assert has_hooks(tiny_sd) and place_pipeline(tiny_sd, CPU) == WHOLE and not has_hooks(tiny_sd)
    buffers = stream_module(tiny_sd.vae.decoder, CPU).buffers
    assert torch.equal(draw(tiny_sd), plain) and buffers.slots[0].buffer
    assert place_pipeline(tiny_sd, CPU) == WHOLE and not has_hooks(tiny_sd) and not buffers.slots[0].buffer
    assert torch.equal(draw(tiny_sd), plain)


def test_what_is_compiled_stays_where_it_is(tiny_sd: StableDiffusionPipeline, tmp_path: Path) -> None:
    compile_pipeline(tiny_sd, tmp_path)
    assert place_pipeline(tiny_sd, CPU) == WHOLE and is_compiled(tiny_sd.unet)


def test_graphs_of_streamed_blocks_do_not_go_unasked(tiny_sd: StableDiffusionPipeline, tmp_path: Path) -> None:
    stream_module(tiny_sd.unet, CPU)
    compile_pipeline(tiny_sd, tmp_path)
    with pytest.raises(RuntimeError, match="those of the unet cannot, as it is compiled or shared"):
        place_pipeline(tiny_sd, CPU)
    assert is_compiled(tiny_sd.unet) and has_hooks(tiny_sd)
