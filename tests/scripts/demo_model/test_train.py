"""The training of the demo model, at a few steps: that it resumes exactly, and that its export is a pipeline."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from runners.cli import UserError
from scripts.demo_model import train
from scripts.demo_model.networks import train_tokenizer
from scripts.demo_model.scenes import COLOURS, sample_scene
from scripts.demo_model.training import fit, save_grid

TINY = ["--device", "cpu", "--scenes", "4", "--preview_pictures", "1", "--save_every", "2"]
STAGES = ("vae", "decoder", "text", "unet")
TINY += [f"--{stage}_{what}={number}" for stage in STAGES for what, number in (("steps", 4), ("batch", 2))]


def run(folder: Path, *arguments: str) -> None:
    train.main(["--work_dir", str(folder / "work"), "--output_dir", str(folder / "model"), *TINY, *arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    run(folder)
    return folder


def test_export_draws_from_a_caption(trained: Path):
    pipe = StableDiffusionPipeline.from_pretrained(trained / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a small red circle on the left, white background", num_inference_steps=2).images[0]
    assert picture.size == (128, 128)


def test_export_has_the_layout_of_sd21_and_fits_in_25_mb(trained: Path):
    model = trained / "model"
    assert {path.name for path in model.iterdir()} == {
        "model_index.json", "defaults.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae"
    }  # fmt: skip
    assert {"vocab.json", "merges.txt"} <= {path.name for path in (model / "tokenizer").iterdir()}
    assert sum(path.stat().st_size for path in model.rglob("*") if path.is_file()) <= 25e6
    scheduler = json.loads((model / "scheduler/scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "PNDMScheduler"
    assert scheduler["prediction_type"] == "epsilon"
    weights = json.loads((model / "unet/config.json").read_text())
    assert weights["use_linear_projection"] is True


def test_latents_get_unit_variance(trained: Path):
    cache = torch.load(trained / "work/latents.pt", weights_only=True)
    config = json.loads((trained / "model/vae/config.json").read_text())
    assert config["scaling_factor"] == cache["scaling_factor"]
    assert (cache["latents"] * config["scaling_factor"]).std().item() == pytest.approx(1)


@pytest.mark.parametrize("stage", STAGES)
def test_interrupted_training_ends_at_the_same_weights(trained: Path, stage: str, monkeypatch: pytest.MonkeyPatch):
    weights = trained / f"work/{stage}.safetensors"
    expected = weights.read_bytes()
    weights.unlink()
    (trained / f"work/{stage}.pt").unlink()

    def stop_after_saving(state: object, path: Path) -> None:
        save(state, path)
        raise KeyboardInterrupt

    save = train.fit.__globals__["save_tensors"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setitem(train.fit.__globals__, "save_tensors", stop_after_saving)
        run(trained, "--stage", stage)
    assert not weights.exists()
    assert torch.load(trained / f"work/{stage}.pt", weights_only=True)["done"] == 2

    run(trained, "--stage", stage)
    assert weights.read_bytes() == expected


def test_fit_learns_and_returns_the_average(tmp_path: Path):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)

    def loss(step: int) -> Tensor:
        inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(step))
        return (model(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean()

    saved = []
    fit(model, loss, 200, 5e-2, tmp_path / "linear.pt", save_every=100, on_save=saved.append)
    assert saved == [100, 200]
    assert loss(1000).item() < 1e-2
    averaged = torch.load(tmp_path / "linear.pt", weights_only=True)["average"]["weight"]
    torch.testing.assert_close(model.weight, averaged)


def test_checkpoint_of_another_schedule_is_refused(tmp_path: Path):
    model = nn.Linear(1, 1)
    fit(model, lambda step: model.weight.sum(), 2, 1e-3, tmp_path / "linear.pt")
    with pytest.raises(UserError, match="run of 2 steps, not 3"):
        fit(model, lambda step: model.weight.sum(), 3, 1e-3, tmp_path / "linear.pt")


def test_stage_without_its_input_says_what_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        run(tmp_path, "--stage", "latents")
    error = capsys.readouterr().err.strip()
    assert error == f"error: {tmp_path}/work/vae.safetensors is missing: run --stage vae first"


def test_unknown_device_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        run(tmp_path, "--device", "abacus")
    error = capsys.readouterr().err.strip()
    assert error == "error: device 'abacus' is unknown: use npu, cuda or cpu, or one of several as npu:1"


def test_vocabulary_has_a_token_for_every_word():
    rng = train.random.Random(0)
    tokenizer = train_tokenizer([sample_scene(rng).caption(rng) for _ in range(500)])
    for word in (*COLOURS, "triangle", "background", "centre"):
        assert len(tokenizer(word).input_ids) == 3, word  # it stands between the start and the end
    assert tokenizer.decode(tokenizer("Größe 日本").input_ids, skip_special_tokens=True) == "größe 日本"


def test_grid_puts_pictures_in_rows(tmp_path: Path):
    pictures = np.stack([np.full((2, 3, 3), value, dtype=np.uint8) for value in (10, 20, 30)])
    save_grid(pictures, tmp_path / "grid.png", columns=2)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (4, 6, 3)
    assert [grid[0, 0, 0], grid[0, 3, 0], grid[2, 0, 0], grid[2, 3, 0]] == [10, 20, 30, 0]
