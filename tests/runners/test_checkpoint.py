"""A model that is one file in the original layout, with its configurations beside it, in a folder or on the hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from runners.checkpoint import check_model
from runners.cli import UserError
from runners.model_dir import load_pipeline
from tests.original_checkpoint import save_original


@pytest.fixture
def configs(tiny_sd_dir: Path, tmp_path: Path) -> Path:
    """The folder of the tiny model without its weights."""
    return shutil.copytree(tiny_sd_dir, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))


@pytest.mark.parametrize("kind", [".safetensors", ".ckpt"])
def test_a_checkpoint_is_the_model_that_was_saved(
    tiny_sd: StableDiffusionPipeline, configs: Path, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / f"model{kind}"
    save_original(tiny_sd, path)
    model = check_model(path, configs)
    for pipeline_class in (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline):
        pipe = load_pipeline(pipeline_class, path, torch.float16, model)
        for name in ("unet", "vae", "text_encoder"):
            expected = getattr(tiny_sd, name).half().state_dict()
            loaded = getattr(pipe, name).state_dict()
            assert loaded.keys() == expected.keys()
            assert all(torch.equal(loaded[key], expected[key]) for key in expected)
            assert not getattr(pipe, name).training


def test_a_checkpoint_counts_by_its_content(tiny_sd: StableDiffusionPipeline, configs: Path, tmp_path: Path) -> None:
    first, copy, other = (tmp_path / f"{name}.safetensors" for name in ("first", "copy", "other"))
    save_original(tiny_sd, first)
    shutil.copy(first, copy)
    with torch.no_grad():
        tiny_sd.unet.conv_in.bias[0] += 1
    save_original(tiny_sd, other)
    digests = [check_model(path, configs).digest() for path in (first, copy, other)]
    assert digests[0] == digests[1] != digests[2]


def test_the_configurations_come_from_the_hubs_cache(
    tiny_sd: StableDiffusionPipeline, configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    save_original(tiny_sd, path)  # of a width that diffusers takes for a Stable Diffusion 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(
        UserError, match="stable-diffusion-v1-5 cannot be had from the hub .*: give a folder .*--config"
    ):
        check_model(path)
    cached = tmp_path / "hub/models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    shutil.copytree(configs, cached / "snapshots/0123")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("0123")
    assert check_model(path).folder == cached / "snapshots/0123"


def test_what_a_checkpoint_lacks_is_named(tiny_sd: StableDiffusionPipeline, configs: Path, tmp_path: Path) -> None:
    whole, part = tmp_path / "model.safetensors", tmp_path / "part.safetensors"
    save_original(tiny_sd, whole)
    tensors = load_file(whole)
    for prefix, message in (
        ("model.diffusion_model.out.2.", "part.safetensors lacks weights of the model that .*configs describe"),
        ("first_stage_model.decoder.up.0.", "part.safetensors lacks weights"),
        ("cond_stage_model.", "Weights for this component appear to be missing in the checkpoint"),
    ):
        save_file({name: value for name, value in tensors.items() if not name.startswith(prefix)}, part)
        with pytest.raises(UserError, match=message):
            load_pipeline(StableDiffusionPipeline, part, torch.float32, check_model(part, configs))


def test_what_is_wrong_is_said_before_loading(configs: Path, tiny_sd_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"\x10")
    torch.save([torch.ones(2)], tmp_path / "list.ckpt")
    save_file({"foo": torch.ones(2)}, tmp_path / "other.safetensors")
    for path, config, message in (
        (tmp_path / "broken.safetensors", configs, "broken.safetensors are damaged"),
        (tmp_path / "list.ckpt", None, "list.ckpt holds no weights by name, but a list"),
        (tmp_path / "other.safetensors", None, "other.safetensors is no checkpoint of Stable Diffusion"),
        (tiny_sd_dir, configs, "--config .* has no effect: --model_path .* is no .safetensors or .ckpt file"),
        (tiny_sd_dir / "unet/diffusion_pytorch_model.safetensors", configs / "unet", "is a part of a model"),
    ):
        with pytest.raises(UserError, match=message):
            check_model(path, config)
