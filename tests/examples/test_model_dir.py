"""A model directory with something wrong is refused with the name of the file at fault."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from examples.common.cli import UserError
from examples.common.model_dir import check_model_dir, load_pipeline


@pytest.fixture
def model(tiny_sd_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_sd_dir, tmp_path / "model")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def drop_a_shard(path: Path) -> None:
    path.write_text(
        json.dumps({"weight_map": {"conv_in.weight": "diffusion_pytorch_model-00002-of-00002.safetensors"}})
    )


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("model_index.json", Path.unlink, "lacks .*model_index.json"),
        ("model_index.json", lambda path: path.write_text("{"), "model_index.json is not valid JSON"),
        ("unet/config.json", Path.unlink, "lacks .*unet/config.json"),
        ("unet/config.json", lambda path: path.write_bytes(b"\xff"), "unet/config.json is not valid JSON"),
        ("unet/diffusion_pytorch_model.safetensors", Path.unlink, "lacks its weights .*unet"),
        ("unet/diffusion_pytorch_model.safetensors", truncate, "unet/diffusion_pytorch_model.safetensors are damaged"),
        ("unet/diffusion_pytorch_model.safetensors.index.json", drop_a_shard, "00002-of-00002.*index.json lists"),
        ("text_encoder/model.safetensors", Path.unlink, "lacks its weights .*text_encoder"),
        ("vae", shutil.rmtree, "lacks .*vae/config.json"),
        ("scheduler/scheduler_config.json", Path.unlink, "lacks .*scheduler_config.json"),
        ("tokenizer", shutil.rmtree, "lacks .*tokenizer/tokenizer.json"),
    ],
)
def test_the_file_at_fault_is_named(model: Path, file: str, damage: Callable[[Path], object], message: str) -> None:
    damage(model / file)
    with pytest.raises(UserError, match=message):
        load_pipeline(StableDiffusionPipeline, model, torch.float32)


def test_weights_that_do_not_fit_the_config_are_an_error(model: Path) -> None:
    config = json.loads((model / "unet" / "config.json").read_text())
    (model / "unet" / "config.json").write_text(json.dumps(config | {"block_out_channels": [64, 64, 64, 64]}))
    with pytest.raises(UserError, match="cannot load the model"):
        load_pipeline(StableDiffusionPipeline, model, torch.float32)


def test_a_whole_model_loads_in_the_wanted_dtype(model: Path) -> None:
    assert check_model_dir(model) is None
    pipe = load_pipeline(StableDiffusionPipeline, model, torch.float16)
    assert {p.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()} == {torch.float16}
    assert pipe.safety_checker is None


def test_weights_that_exist_in_the_fp16_variant_only_are_found(model: Path, tiny_sd: StableDiffusionPipeline) -> None:
    for weights in model.rglob("*.safetensors"):
        weights.rename(weights.with_suffix(".fp16.safetensors"))
    pipe = load_pipeline(StableDiffusionPipeline, model, torch.float32)
    assert torch.equal(pipe.unet.conv_in.weight, tiny_sd.unet.conv_in.weight)
