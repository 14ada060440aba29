"""`compile_pipeline` on the CPU: one graph for each kind of call, the pictures of eager mode."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from ascend.graph import compile_pipeline


def draw(pipe: StableDiffusionPipeline, prompt: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(
        prompt, num_inference_steps=3, height=64, width=64, cache_interval=2, generator=generator, output_type="pt"
    ).images


@torch.no_grad()
@pytest.mark.parametrize("name", ["text_encoder", "decoder"])
def test_each_component_is_one_graph(tiny_sd: StableDiffusionPipeline, name: str) -> None:
    module = {"text_encoder": tiny_sd.text_encoder, "decoder": tiny_sd.vae.decoder}[name]
    inputs = {"text_encoder": torch.ones(1, 77, dtype=torch.int64), "decoder": torch.ones(1, 4, 8, 8)}[name]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=False)
    compiled(inputs)
    compiled(inputs + 1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_compiled_pipeline_draws_the_same_without_break_or_recompilation(tiny_sd: StableDiffusionPipeline) -> None:
    plain = [draw(tiny_sd, prompt) for prompt in ("a red circle", "a blue square")]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert compile_pipeline(tiny_sd) == {"text_encoder": "inductor", "unet": "inductor", "vae.decoder": "inductor"}
    first = draw(tiny_sd, "a red circle")
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 4  # text encoder, full UNet, shallow UNet, VAE decoder
    second = draw(tiny_sd, "a blue square")
    assert counters["stats"]["unique_graphs"] == 4
    # Fused kernels round in another order; a denoising loop of 3 steps keeps that far below one of 255 grey levels.
    torch.testing.assert_close(torch.cat([first, second]), torch.cat(plain), atol=1e-3, rtol=0)


def test_an_offloaded_component_stays_eager(tiny_sd: StableDiffusionPipeline) -> None:
    for module in (tiny_sd.text_encoder, tiny_sd.unet, tiny_sd.vae.decoder):
        module._hf_hook = object()
    assert set(compile_pipeline(tiny_sd).values()) == {"eager"}
