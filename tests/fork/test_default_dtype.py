"""A pipeline that is loaded without a dtype has one dtype: torch's default, whatever its files hold."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor


def dtypes(pipe: DiffusionPipeline) -> dict[str, torch.dtype]:
    return {
        name: parameter.dtype
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
        for parameter in part.parameters()
    }


def add_safety_checker(pipe: StableDiffusionPipeline) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config=sizes | {"image_size": 8, "patch_size": 4}, projection_dim=8)
    pipe.register_modules(safety_checker=StableDiffusionSafetyChecker(config), feature_extractor=CLIPImageProcessor())


@pytest.fixture(params=["safetensors", "sharded", "fp16 variant"])
def half_precision(request: pytest.FixtureRequest, tiny_sd: StableDiffusionPipeline, tmp_path: Path) -> dict[str, Any]:
    """How to load a pipeline saved in float16."""
    add_safety_checker(tiny_sd)
    variant = {"variant": "fp16"} if request.param == "fp16 variant" else {}
    shards = {"max_shard_size": "20KB"} if request.param == "sharded" else {}
    tiny_sd.to(dtype=torch.float16).save_pretrained(tmp_path, **variant, **shards)
    if shards:
        assert len(list(tmp_path.glob("text_encoder/*.safetensors"))) > 1
        assert len(list(tmp_path.glob("unet/*.safetensors"))) > 1
    return {"pretrained_model_name_or_path": tmp_path, **variant}


@pytest.mark.parametrize("loader", [StableDiffusionPipeline, DiffusionPipeline])
def test_a_half_precision_checkpoint_without_a_dtype_is_float32(
    half_precision: dict[str, Any], loader: type[DiffusionPipeline]
) -> None:
    pipe = loader.from_pretrained(**half_precision)
    assert dtypes(pipe) == dict.fromkeys(["vae", "text_encoder", "unet", "safety_checker"], torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe("a cat", num_inference_steps=1, output_type="latent")


def test_a_dtype_that_is_given_holds(half_precision: dict[str, Any]) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(**half_precision, dtype=torch.bfloat16)
    assert set(dtypes(pipe).values()) == {torch.bfloat16}
    mixed = StableDiffusionPipeline.from_pretrained(**half_precision, dtype={"unet": torch.float16})
    assert dtypes(mixed)["unet"] == torch.float16
    assert dtypes(mixed)["text_encoder"] == torch.float32
