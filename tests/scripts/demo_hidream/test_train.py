"""The training of the demo editor, at two steps: that it resumes exactly, and that its export is a pipeline."""

from pathlib import Path

import pytest
import torch
from diffusers import HiDreamImageEditingPipeline, HiDreamImageTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

from scripts.demo_hidream import evaluate, train
from scripts.demo_hidream.dataset import Dataset, tokenize
from scripts.demo_hidream.edits import held_out_edits
from scripts.demo_hidream.networks import (
    TextEncoders,
    build_refiner,
    build_tokenizer,
    to_patches,
    train_experts_densely,
)

TINY = ["--device", "cpu", "--families", "2", "--batch", "2", "--steps", "2", "--save_seconds", "0"]
TINY += ["--decoder_steps", "1", "--decoder_batch", "1"]
WEIGHTS = [train.weights_name(part) for part in train.PARTS]


def run(folder: Path, *arguments: str) -> None:
    train.main(["--work_dir", str(folder / "work"), "--output_dir", str(folder / "model"), *TINY, *arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("editor")
    run(folder)
    return folder


def test_export_edits_and_refines(trained: Path):
    edit = held_out_edits(1, seed=0)[0]
    pipe = HiDreamImageEditingPipeline.from_pretrained(trained / "model", dtype=torch.float32)
    refiner = HiDreamImageTransformer2DModel.from_pretrained(trained / "model" / train.REFINER, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    call = {"image": Image.fromarray(edit.source.render()), "num_inference_steps": 2, "output_type": "np"}
    edited, refined = (
        pipe(edit.instruction(), target_prompt="red circle", refine_strength=r, refiner=refiner, **call).images
        for r in (0.0, 0.5)
    )
    assert edited.shape == (1, 128, 128, 3)
    assert (edited != refined).any()


def test_export_fits_in_30_mb(trained: Path):
    assert sum(path.stat().st_size for path in (trained / "model").rglob("*") if path.is_file()) <= 30e6


def test_the_pipeline_reads_texts_as_the_training_does(trained: Path):
    pipe = HiDreamImageEditingPipeline.from_pretrained(trained / "model", dtype=torch.float32)
    texts = ["make the circle blue", "move it to the top left"]
    encoders = TextEncoders(build_tokenizer()).eval()
    encoders.load_state_dict(load_file(trained / "work" / train.weights_name("texts")), strict=False)
    with torch.no_grad():
        t5, negative, llama, _, pooled, _ = pipe.encode_prompt(texts)
        ours = encoders(tokenize(build_tokenizer(), [*texts, ""]).long())
    torch.testing.assert_close(t5, ours.t5[:2])
    torch.testing.assert_close(negative[0], ours.t5[2])
    torch.testing.assert_close(llama, ours.llama[:, :2])
    torch.testing.assert_close(pooled, ours.pooled[:2])


def test_latents_get_unit_size(trained: Path):
    data = Dataset.load(trained / "work" / train.DATASET)
    config = HiDreamImageEditingPipeline.load_config(trained / "model")
    assert config["vae"] == ["diffusers", "AutoencoderKL"]
    latents = (data.latents.float() - data.shift) * data.scale
    assert latents.std().item() == pytest.approx(1, rel=1e-3)
    assert latents.mean().item() == pytest.approx(0, abs=1e-3)
    assert data.counts.sum() == len(data.pairs) == len(data.instructions)


def test_interrupted_training_ends_at_the_same_weights(trained: Path, monkeypatch: pytest.MonkeyPatch):
    work = trained / "work"
    expected = {name: (work / name).read_bytes() for name in WEIGHTS}
    for name in (*WEIGHTS, train.CHECKPOINT):
        (work / name).unlink()

    def stop_after_saving(*arguments: object) -> None:
        save(*arguments)
        if torch.load(work / train.CHECKPOINT, weights_only=True)["done"] == 1:
            raise KeyboardInterrupt

    save = train.save_weights
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "save_weights", stop_after_saving)
        run(trained, "--stage", "train")
    run(trained, "--stage", "train")
    assert {name: (work / name).read_bytes() for name in WEIGHTS} == expected


def test_dense_experts_compute_what_the_module_computes():
    torch.manual_seed(0)
    transformer = build_refiner()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    call = {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "timesteps": torch.tensor([500.0, 20.0]),
        "encoder_hidden_states_t5": torch.randn(2, 3, 128),
        "encoder_hidden_states_llama3": torch.randn(3, 2, 3, 128),
        "pooled_embeds": torch.randn(2, 256),
        "return_dict": False,
    }
    with torch.no_grad():
        expected = transformer.eval()(**call)[0]
        train_experts_densely(transformer)
        torch.testing.assert_close(transformer(**call)[0], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(transformer.train()(**call)[0], to_patches(expected), atol=1e-4, rtol=1e-4)


def test_training_without_a_dataset_says_what_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        run(tmp_path, "--stage", "train")
    error = capsys.readouterr().err.strip()
    assert error == f"error: {tmp_path}/work/{train.DATASET} is missing: run --stage dataset first"


def test_evaluation_scores_each_strength(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--num_edits", "2", "--steps", "2", "--device", "cpu", "--output_dir", str(tmp_path)]
    evaluate.main(["--model_path", str(trained / "model"), *options])
    table = capsys.readouterr().out
    assert all(name in table for name in (evaluate.VAE_ALONE, "edited", "refined 0.3"))
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (8 * 128, 128)
