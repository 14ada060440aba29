"""That the dry runs of known models run, and what they depend on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, HiDreamImageTransformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5EncoderModel,
)

from ascend.planner.activations import peak_of, record_call
from ascend.planner.calls import Request, calls_of
from ascend.planner.memory_plan import part_of

CHANNELS = {"block_out_channels": (32, 64), "layers_per_block": 1}
VAE = {
    "block_out_channels": (8, 8, 8, 8),
    "norm_num_groups": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


def hidream_models(latent_channels: int = 16) -> dict[str, nn.Module]:
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    return {
        "text_encoder": CLIPTextModelWithProjection(CLIPTextConfig(**small, projection_dim=32)),
        "text_encoder_3": T5EncoderModel(T5Config(d_model=32, d_ff=64, d_kv=16, num_layers=2, num_heads=2)),
        "text_encoder_4": LlamaForCausalLM(LlamaConfig(**small)),
        "transformer": HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=latent_channels,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=32,
            num_attention_heads=2,
            caption_channels=[32, 32],
            text_emb_dim=64,
            axes_dims_rope=(16, 8, 8),
            max_resolution=(32, 32),
            llama_layers=[0, 1],
        ),
        "vae": AutoencoderKL(**VAE, latent_channels=latent_channels),
    }


def controlnet_models() -> dict[str, nn.Module]:
    shape = CHANNELS | {"cross_attention_dim": 32, "attention_head_dim": 8}
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    return {
        "controlnet": ControlNetModel(**shape, down_block_types=down, conditioning_embedding_out_channels=(8,) * 4),
        "unet": UNet2DConditionModel(**shape, down_block_types=down, up_block_types=up),
        "vae": AutoencoderKL(**VAE),
    }


@pytest.mark.parametrize("make", [hidream_models, controlnet_models])
def test_every_model_is_known_and_has_a_peak(make: Callable[[], dict[str, nn.Module]]) -> None:
    with torch.device("meta"):
        models = make()
    for model in models.values():
        model.eval().requires_grad_(False)
    calls = calls_of(models, Request(128, 64, image=True), torch.float32)
    parts = {name: part_of(name, model, calls[name], True) for name, model in models.items()}
    assert set(calls) == set(models) and all(run.peak > 0 for part in parts.values() for run in part.runs)
    assert [run.phase for run in parts["vae"].runs] == ["encode", "decode"]
    assert sum(part.denoises for part in parts.values()) == len(set(parts) & {"transformer", "controlnet", "unet"})


def test_the_residuals_of_a_controlnet_are_inputs_of_the_unet() -> None:
    with torch.device("meta"):
        models = controlnet_models()
    (call,) = calls_of(models, Request(64, 64), torch.float32)["unet"]
    down = call.inputs["down_block_additional_residuals"]
    assert [tuple(residual.shape[1:]) for residual in down] == [(32, 8, 8), (32, 8, 8), (32, 4, 4), (64, 4, 4)]


def test_experts_get_as_many_rows_as_the_others() -> None:
    """As a run with values has so many rows in all, whichever way its gate sends them."""
    model: Any = hidream_models()["transformer"].eval().requires_grad_(False)
    block = model.single_stream_blocks[0].block.ff_i
    rows: list[int] = []
    for expert in block.experts:
        expert.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    block(torch.randn(2, 50, 64))
    assert sum(rows) == 200
    rows.clear()
    meta = block.to("meta")
    assert peak_of(record_call(meta, {"x": torch.empty(2, 50, 64, device="meta")}, True)) > 0
    assert rows == [50, 50, 50, 50]
