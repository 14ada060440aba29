"""A model directory with something wrong is refused with the name of the file at fault."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from runners.cli import UserError
from runners.model_dir import check_model_dir, guidance_scale_of, load_pipeline


@pytest.fixture
def model(tiny_sd_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_sd_dir, tmp_path / "model")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def link_to_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("../../../blobs/0123")


def point_to_lfs(path: Path) -> None:
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n")


class Code:
    """What a pickle would run when it is loaded."""

    def __reduce__(self) -> tuple:
        return print, ("this must never be printed",)


def as_bin(damage: Callable[[Path], object], is_archive: bool = True) -> Callable[[Path], None]:
    """Save the weights as .bin instead, and damage them."""

    def change(path: Path) -> None:
        target = path.with_name("pytorch_model.bin" if path.name.startswith("model") else f"{path.stem}.bin")
        torch.save(load_file(path), target, _use_new_zipfile_serialization=is_archive)
        path.unlink()
        damage(target)

    return change


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
        (
            "unet/diffusion_pytorch_model.safetensors",
            link_to_nowhere,
            "is a link to ../../../blobs/0123, which is not",
        ),
        ("tokenizer/tokenizer.json", link_to_nowhere, "tokenizer.json is a link to"),
        ("unet/config.json", link_to_nowhere, "unet/config.json is a link to"),
        ("unet/diffusion_pytorch_model.safetensors", point_to_lfs, "a git-lfs pointer .*: run git lfs pull"),
        ("unet/config.json", point_to_lfs, "unet/config.json is a git-lfs pointer"),
        ("text_encoder/model.safetensors", as_bin(point_to_lfs), "pytorch_model.bin is a git-lfs pointer"),
        ("text_encoder/model.safetensors", as_bin(truncate), "pytorch_model.bin are cut short; copy them again"),
        ("text_encoder/model.safetensors", as_bin(truncate, is_archive=False), "pytorch_model.bin are damaged"),
        ("vae/diffusion_pytorch_model.safetensors", as_bin(lambda path: path.write_text("<html>")), "are damaged or"),
        (
            "vae/diffusion_pytorch_model.safetensors",
            as_bin(lambda path: torch.save({"weight": Code()}, path)),
            "hold more than tensors, which is not safe",
        ),
        (
            "vae/diffusion_pytorch_model.safetensors",
            as_bin(lambda path: path.write_bytes(pickle.dumps({"weight": Code()}))),
            "hold more than tensors, which is not safe",
        ),
        (
            "unet/diffusion_pytorch_model.safetensors.index.json",
            lambda path: path.write_text("{}"),
            "index.json lists no files of weights",
        ),
        ("model_index.json", lambda path: path.write_text("[1]"), "must hold a JSON object, not list"),
        (
            "model_index.json",
            lambda path: edit(path, _class_name="StableDiffusionXLPipeline"),
            "holds a StableDiffusionXLPipeline, and what draws here is a StableDiffusionPipeline",
        ),
        ("model_index.json", lambda path: edit(path, text_encoder=[None, None]), "names no text_encoder"),
        ("model_index.json", lambda path: edit(path, unet=["diffusers", "NoSuchModel"]), "cannot load the model"),
        ("unet/config.json", lambda path: edit(path, in_channels=9), "it is an inpainting model"),
        ("unet/config.json", lambda path: edit(path, addition_embed_type="text_time"), "as in the XL family"),
        (
            "unet/config.json",
            lambda path: edit(path, cross_attention_dim=48),
            "are 32 numbers wide, and the UNet takes 48",
        ),
        ("unet/config.json", lambda path: edit(path, block_out_channels="many"), "cannot load the model"),
        ("text_encoder/config.json", lambda path: edit(path, vocab_size=8), "cannot load the model|do not belong"),
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


def test_no_message_advises_to_load_what_is_not_safe(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = model / "unet/diffusion_pytorch_model.safetensors"
    as_bin(lambda path: torch.save({"weight": Code()}, path))(weights)
    with pytest.raises(UserError) as refusal:
        load_pipeline(StableDiffusionPipeline, model, torch.float32)
    assert "weights_only" not in str(refusal.value) and "\n" not in str(refusal.value)
    assert "never be printed" not in capfd.readouterr().out


@pytest.mark.parametrize("is_archive", [True, False])
def test_weights_that_are_no_safetensors_load_too(
    model: Path, tiny_sd: StableDiffusionPipeline, is_archive: bool
) -> None:
    for weights in model.rglob("*.safetensors"):
        as_bin(lambda path: None, is_archive)(weights)
    pipe = load_pipeline(StableDiffusionPipeline, model, torch.float32)
    assert torch.equal(pipe.unet.conv_in.weight, tiny_sd.unet.conv_in.weight)


def test_damaged_files_that_are_not_loaded_do_not_matter(model: Path) -> None:
    """As git-lfs leaves them when only the .safetensors were pulled."""
    point_to_lfs(model / "unet/diffusion_pytorch_model.bin")
    point_to_lfs(model / "unet/diffusion_pytorch_model.fp16.safetensors")
    assert load_pipeline(StableDiffusionPipeline, model, torch.float32)


def test_a_path_that_is_no_pipeline_is_named_for_what_it_is(model: Path) -> None:
    for path, message in (
        (model / "unet/diffusion_pytorch_model.safetensors", "is a file: a folder in"),
        (model / "unet", f"is a part of a model: give {model}"),
        (model.parent, f"holds no model itself; {model} does"),
        (model.parent / "missing", "missing does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            check_model_dir(path)
    (model.parent / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match="is a link to nowhere, which is not there"):
        check_model_dir(model.parent / "link")


def test_a_tokenizer_without_a_limit_takes_the_text_encoder_s(model: Path) -> None:
    config = json.loads((model / "tokenizer/tokenizer_config.json").read_text())
    del config["model_max_length"]
    (model / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
    assert load_pipeline(StableDiffusionPipeline, model, torch.float32).tokenizer.model_max_length == 77


def test_the_digest_is_of_what_is_in_the_files(model: Path, tmp_path: Path) -> None:
    first = check_model_dir(model).digest()
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "README.md").write_text("what it is")
    (copy / "unet/diffusion_pytorch_model.bin").write_bytes(b"not loaded")
    assert check_model_dir(copy).digest() == first
    weights = copy / "vae/diffusion_pytorch_model.safetensors"
    times = weights.stat()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert check_model_dir(copy).digest() != first, "one bit more, same size and date"
    edit(model / "scheduler/scheduler_config.json", beta_end=0.013)
    assert check_model_dir(model).digest() != first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"guidance_scale": "much"}', "guidance_scale must be a number, not 'much'"),
        ('{"guidance": 2}', "guidance is unknown; it may say guidance_scale"),
        ("{", "defaults.json is not valid JSON"),
    ],
)
def test_a_model_s_defaults_that_are_wrong_are_an_error(model: Path, text: str, message: str) -> None:
    assert guidance_scale_of(model) == 7.5
    (model / "defaults.json").write_text(text)
    with pytest.raises(UserError, match=message):
        guidance_scale_of(model)


def test_a_whole_model_loads_in_the_wanted_dtype(model: Path) -> None:
    assert check_model_dir(model).variant is None
    pipe = load_pipeline(StableDiffusionPipeline, model, torch.float16)
    assert {p.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()} == {torch.float16}
    assert pipe.safety_checker is None


def test_weights_that_exist_in_the_fp16_variant_only_are_found(model: Path, tiny_sd: StableDiffusionPipeline) -> None:
    for weights in model.rglob("*.safetensors"):
        weights.rename(weights.with_suffix(".fp16.safetensors"))
    pipe = load_pipeline(StableDiffusionPipeline, model, torch.float32)
    assert torch.equal(pipe.unet.conv_in.weight, tiny_sd.unet.conv_in.weight)
