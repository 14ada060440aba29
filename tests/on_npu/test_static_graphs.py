"""A pipeline as graphs: the pictures of eager mode, one graph for each kind of call, none to compile a second time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch_npu
from diffusers import StableDiffusionPipeline
from torch import nn

from ascend.graph import compile_pipeline
from processors import enable_flash_attention, enable_token_merging
from tests.on_npu.helpers import SATURATES

HALF = torch.float16 if SATURATES else torch.bfloat16
FRACTAL_NZ = 29
PROMPTS = ("a red circle", "a blue square", "two green stars")


@pytest.fixture
def pipe(tiny_sd_dir: Path, npu: torch.device) -> StableDiffusionPipeline:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd_dir, dtype=HALF).to(npu)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: StableDiffusionPipeline, prompt: str, size: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 3, "cache_interval": 2, "num_images_per_prompt": 2, "output_type": "pt"}
    return pipe(prompt, height=size, width=size, generator=generator, **options).images.cpu().float()


@pytest.mark.parametrize("merging", (False, True))
def test_graphs_draw_what_eager_does_without_a_break_or_recompilation(
    pipe: StableDiffusionPipeline, merging: bool, tmp_path: Path
) -> None:
    counters = torch._dynamo.utils.counters
    enable_flash_attention(pipe)
    if merging:
        enable_token_merging(pipe, ratio=0.5)
    eager = [draw(pipe, prompt) for prompt in PROMPTS]
    assert set(compile_pipeline(pipe, tmp_path).values()) == {"torchair"}
    linear = [module for module in pipe.unet.modules() if isinstance(module, nn.Linear)]
    assert {torch_npu.get_npu_format(module.weight) for module in linear} == {FRACTAL_NZ}

    graphs = [draw(pipe, prompt) for prompt in PROMPTS]
    for graph, plain in zip(graphs, eager, strict=True):
        assert (graph - plain).abs().mean() < (0.01 if SATURATES else 0.03)
    assert counters["stats"]["unique_graphs"] == 4  # text encoder, full UNet, shallow UNet, VAE decoder
    assert not counters["graph_break"]
    assert pipe.unet.forward.compilations == 2


def test_graphs_are_found_again(
    pipe: StableDiffusionPipeline, tiny_sd_dir: Path, npu: torch.device, tmp_path: Path
) -> None:
    enable_flash_attention(pipe)
    enable_token_merging(pipe)
    compile_pipeline(pipe, tmp_path)
    picture = draw(pipe, PROMPTS[0])
    again = StableDiffusionPipeline.from_pretrained(tiny_sd_dir, dtype=HALF).to(npu)
    again.set_progress_bar_config(disable=True)
    enable_flash_attention(again)
    enable_token_merging(again)
    compile_pipeline(again, tmp_path)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    assert torch.equal(draw(again, PROMPTS[0]), picture)
    components = (again.text_encoder, again.unet, again.vae.decoder)
    assert [module.forward.compilations for module in components] == [0, 0, 0]
    assert counters["stats"]["unique_graphs"] == 0


def test_a_size_seen_before_is_not_compiled_again(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    compile_pipeline(pipe, tmp_path)
    for size in (64, 96, 64):
        draw(pipe, PROMPTS[0], size)
    assert pipe.unet.forward.compilations == 4
