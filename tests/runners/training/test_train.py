"""A training from its command line to its files: what it leaves, how it goes on, and what ends it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runners.images import MARGIN
from runners.training import checkpoints, loop
from runners.training.checkpoints import Checkpoints, one_training_in
from tests.programs import ROOT
from tests.training_work import adapter, arguments, losses, same, step_names, train, write_pictures


def refusal(
    capsys: pytest.CaptureFixture[str], code: int, run: Callable[..., object], *words: Any, **named: Any
) -> str:
    """The one line with which a training ends."""
    with pytest.raises(SystemExit) as ended:
        run(*words, **named)
    assert ended.value.code == code
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    return said[0]


def test_an_adapter_is_trained_and_loads(trained_dir: Path, small_sd: StableDiffusionPipeline) -> None:
    weights = adapter(trained_dir)
    assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in weights)
    assert all(torch.any(weights[name]) for name in weights if ".lora_B." in name)  # each matrix has moved from 0
    before = small_sd("a", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
    small_sd.load_lora_weights(trained_dir)
    after = small_sd("a", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert (before != after).any()
    assert len(losses(trained_dir)) == 6


def test_checkpoints_are_bounded(trained_dir: Path) -> None:
    assert step_names(trained_dir) == ["step-00000002", "step-00000004", "step-00000006"]


@pytest.mark.parametrize("more", [(), ("--full",), ("--preset", "full", "--gradient_accumulation", "1")])
def test_a_resumed_training_ends_at_the_same_bits(
    more: tuple[str, ...], pictures: Path, small_sd_dir: Path, tmp_path: Path
) -> None:
    whole = train(pictures, small_sd_dir, tmp_path / "whole", *more)
    half = tmp_path / "half"
    shutil.copytree(whole, half)
    for name in ("step-00000004", "step-00000006"):
        shutil.rmtree(half / "checkpoints" / name)
    shutil.rmtree(half / "pipeline", ignore_errors=True)
    (half / "pytorch_lora_weights.safetensors").unlink(missing_ok=True)
    train(pictures, small_sd_dir, half, *more, "--resume")
    first, second = (Checkpoints(folder / "checkpoints", 3).load(6).state for folder in (whole, half))
    for part in ("weights", "average") if "average" in first else ("weights",):
        assert same(first[part], second[part])
    if "average" in first:
        assert not same(first["average"], first["weights"])
    if "--full" not in more:
        assert same(adapter(whole), adapter(half))
    assert losses(whole) == losses(half)


def test_curves_of_a_resumed_training_have_each_step(
    pictures: Path, small_sd_dir: Path, trained_dir: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    shutil.copytree(trained_dir, half)
    shutil.rmtree(half / "checkpoints/step-00000006")
    train(pictures, small_sd_dir, half, "--resume")
    curves = EventAccumulator(str(half / "logs")).Reload()
    assert [point.step for point in curves.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_training_without_tensorboard_says_so(pictures: Path, small_sd_dir: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    code = (  # in a process of its own, as accelerate looks for it once, when it is imported
        "import sys\n"
        "sys.modules |= {'tensorboard': None, 'tensorboardX': None}\n"
        "from pathlib import Path\n"
        "from runners.training.run import main\n"
        "main(None, Path())\n"
    )
    words = arguments(pictures, small_sd_dir, made, steps=1)
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no logs for TensorBoard: pip install -r requirements-training.txt" in done.stderr
    assert not (made / "logs").exists()


def test_accumulated_batches_are_one_batch(pictures: Path, small_sd_dir: Path, tmp_path: Path) -> None:
    at_once = train(pictures, small_sd_dir, tmp_path / "a", "--batch_size", 4, steps=2)
    in_parts = train(pictures, small_sd_dir, tmp_path / "b", "--batch_size", 1, "--gradient_accumulation", 4, steps=2)
    torch.testing.assert_close(losses(in_parts), losses(at_once), rtol=1e-5, atol=0)


@pytest.mark.parametrize("preset", ["speed", "balanced", "memory", "full"])
def test_presets_train_to_the_same_losses(
    preset: str, pictures: Path, small_sd_dir: Path, trained_dir: Path, tmp_path: Path
) -> None:
    made = train(pictures, small_sd_dir, tmp_path / preset, "--preset", preset, steps=2)
    torch.testing.assert_close(losses(made), losses(trained_dir)[:2], rtol=1e-5, atol=0)


def test_full_training_leaves_a_pipeline(pictures: Path, small_sd_dir: Path, tmp_path: Path) -> None:
    made = train(pictures, small_sd_dir, tmp_path / "full", "--full", "--no-ema", steps=2)
    pipe = StableDiffusionPipeline.from_pretrained(made / "pipeline")
    before = StableDiffusionPipeline.from_pretrained(small_sd_dir).unet.state_dict()
    moved = [name for name, weight in pipe.unet.state_dict().items() if not torch.equal(weight, before[name])]
    assert len(moved) == len(before)  # each of them gets a gradient


def test_validation_pictures_are_a_sheet(pictures: Path, small_sd_dir: Path, tmp_path: Path) -> None:
    more = ("--validation_prompt", "one", "--validation_prompt", "two", "--validation_steps", 1)
    made = train(pictures, small_sd_dir, tmp_path / "made", *more, "--validation_every", 1, steps=2)
    sheets = sorted((made / "validation").iterdir())
    assert [sheet.name for sheet in sheets] == ["step-00000001.png", "step-00000002.png"]
    assert Image.open(sheets[0]).height > 2 * 64
    plain = train(pictures, small_sd_dir, tmp_path / "plain", steps=2)
    assert same(adapter(made), adapter(plain))  # drawing changes nothing


def test_validation_in_mixed_precision(pictures: Path, small_sd_dir: Path, tmp_path: Path) -> None:
    more = ("--dtype", "bfloat16", "--validation_prompt", "one", "--validation_steps", 1)
    made = train(pictures, small_sd_dir, tmp_path / "made", *more, steps=1)
    assert (made / "validation/step-00000001.png").exists()


def test_velocity_offset_and_weights_change_the_loss(
    pictures: Path, small_sd_dir: Path, trained_dir: Path, tmp_path: Path
) -> None:
    for more in (("--prediction_type", "v_prediction"), ("--noise_offset", "0.1"), ("--snr_gamma", "1")):
        made = train(pictures, small_sd_dir, tmp_path / more[0], *more, steps=1)
        assert losses(made)[0] != losses(trained_dir)[0]


def test_what_was_trained_to_say_velocity_draws_by_velocity(
    pictures: Path, small_sd_dir: Path, trained_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--prediction_type", "v_prediction", "--validation_prompt", "one", "--validation_steps", 2)
    made = train(pictures, small_sd_dir, tmp_path / "made", *more, "--full", "--no-ema", steps=1)
    assert "the adapter draws only" not in capsys.readouterr().err
    pipe = StableDiffusionPipeline.from_pretrained(made / "pipeline")
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    drawn = pipe("one", num_inference_steps=2, generator=torch.Generator().manual_seed(0), height=64, width=64)
    sheet = Image.open(made / "validation/step-00000001.png")
    bottom = sheet.height - 2 * MARGIN
    assert (np.asarray(sheet.crop((MARGIN, bottom - 64, MARGIN + 64, bottom))) == np.asarray(drawn.images[0])).all()
    train(pictures, small_sd_dir, tmp_path / "adapter", *more[:2], steps=1)
    assert "whose scheduler/scheduler_config.json has that prediction_type" in capsys.readouterr().err


def test_a_model_that_predicts_pictures_is_refused(
    pictures: Path, small_sd_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(small_sd_dir, model)
    config = model / "scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "sample"}))
    assert "prediction_type 'sample'" in refusal(capsys, 2, train, pictures, model, tmp_path / "made", steps=1)


def test_a_loss_that_is_no_number_ends_the_training(
    pictures: Path, small_sd_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--learning_rate", "1e30", "--checkpoint_every", 1, "--full")
    said = refusal(capsys, 2, train, pictures, small_sd_dir, tmp_path / "made", *more)
    assert "--learning_rate 1e+30 may be too high" in said
    steps = Checkpoints(tmp_path / "made/checkpoints", 3).steps()
    assert f"the last good checkpoint is of step {steps[-1]}" in said
    assert all(
        torch.isfinite(tensor).all()
        for tensor in Checkpoints(tmp_path / "made/checkpoints", 3).load(steps[-1]).state["weights"].values()
    )


def test_a_full_disk_leaves_the_last_checkpoint(
    pictures: Path,
    small_sd_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save = torch.save
    calls = []

    def fail_the_second_time(state: object, path: Path) -> None:
        calls.append(path)
        save({"half": 1}, path)
        if len(calls) > 1:
            raise OSError(28, os.strerror(28), str(path))

    monkeypatch.setattr(checkpoints.torch, "save", fail_the_second_time)
    said = refusal(capsys, 1, train, pictures, small_sd_dir, tmp_path / "made")
    assert "No space left on device" in said
    assert step_names(tmp_path / "made") == ["step-00000002"]


def test_what_a_killed_training_left_is_in_nobodys_way(pictures: Path, small_sd_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "made/checkpoints" / f".step-00000002.{os.getpid()}.part").mkdir(parents=True)  # ids come again
    train(pictures, small_sd_dir, tmp_path / "made", steps=2)
    assert step_names(tmp_path / "made") == ["step-00000002"]


def test_another_model_is_not_resumed(
    pictures: Path, small_sd_dir: Path, tiny_sd_dir: Path, trained_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    made = tmp_path / "made"
    shutil.copytree(trained_dir, made)
    assert "another model" in refusal(capsys, 2, train, pictures, tiny_sd_dir, made, "--resume")
    said = refusal(capsys, 2, train, pictures, small_sd_dir, made, "--resume", "--lora_rank", 2)
    assert "lora_rank was 4 and is 2" in said
    assert "go on with --resume" in refusal(capsys, 2, train, pictures, small_sd_dir, made)
    said = refusal(capsys, 2, train, pictures, small_sd_dir, made, "--resume", steps=5)
    assert "is of step 6, beyond --steps 5" in said
    train(pictures, small_sd_dir, made, "--resume", "--learning_rate", "1e-4", steps=7)
    assert "learning_rate was 0.001 and is 0.0001" in capsys.readouterr().err
    (made / "checkpoints/step-00000007/state.pt").write_bytes(b"")
    assert "is damaged" in refusal(capsys, 2, train, pictures, small_sd_dir, made, "--resume", steps=8)


def test_other_captions_are_said_when_resuming(
    small_sd_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_pictures(tmp_path / "data", 4)
    made = train(data, small_sd_dir, tmp_path / "made", steps=2)
    train(data, small_sd_dir, made, "--resume", steps=3)
    assert "are others than before" not in capsys.readouterr().err
    rows = (data / "metadata.jsonl").read_text()
    (data / "metadata.jsonl").write_text(rows.replace("picture 3", "another"))
    train(data, small_sd_dir, made, "--resume", steps=4)
    assert "pictures or captions are others than before, now 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--full", "--lora_rank", 4), "--lora_rank 4 has no effect with --full"),
        (("--no-ema", "--ema_decay", 0.5), "--ema_decay 0.5 has no effect without --ema"),
        (("--validation_every", 5), "--validation_every 5 has no effect without --validation_prompt"),
        (("--warmup_steps", 5), "--warmup_steps 5 has no effect with --lr_schedule constant"),
    ],
)
def test_options_without_effect_are_refused(
    pictures: Path,
    small_sd_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[object, ...],
    message: str,
) -> None:
    assert message in refusal(capsys, 2, train, pictures, small_sd_dir, tmp_path / "made", *options)
    assert not (tmp_path / "made").exists()


def test_a_resumed_training_obeys_its_own_settings(
    pictures: Path, small_sd_dir: Path, trained_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained_dir, tmp_path / "made")
    more = ("--resume", "--learning_rate", "1e-4", "--lr_schedule", "linear", "--weight_decay", "0.5")
    made = train(pictures, small_sd_dir, tmp_path / "made", *more, steps=8)
    rows = [json.loads(line) for line in (made / loop.LOG).read_text().splitlines()]
    assert [row["learning_rate"] for row in rows[6:]] == pytest.approx([1e-4 * 2 / 8, 1e-4 * 1 / 8])
    groups = Checkpoints(made / "checkpoints", 3).load(8).state["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.5}


def test_one_training_at_a_time(pictures: Path, small_sd_dir: Path, tmp_path: Path, capsys: Any) -> None:
    with one_training_in(tmp_path):
        assert "another training runs" in refusal(capsys, 2, train, pictures, small_sd_dir, tmp_path)


def test_bad_settings_are_one_line(pictures: Path, small_sd_dir: Path, tmp_path: Path, capsys: Any) -> None:
    def said(*more: object) -> str:
        return refusal(capsys, 2, train, pictures, small_sd_dir, tmp_path / "made", *more)

    assert "multiple of 8" in said("--resolution", 65)
    assert "float16" in said("--dtype", "float16")
    assert "constant_with_warmup" in said("--warmup_steps", 3)
    assert "must be from 0 to 1" in said("--caption_dropout", 2)
    assert "must be 0 or more" in said("--weight_decay", -1)
    assert "take linear" in said("--learning_rate", "1e-8", "--lr_schedule", "polynomial")
    prompts = ("--validation_prompt", "a", "--validation_prompt", "b")
    assert "is too large" in said("--seed", 2**63 - 1, *prompts)
    assert "is too large" in said("--seed", 2**70)
    assert "does not exist" in said("--data", tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "holds no picture" in said("--data", tmp_path / "empty")
    assert not (tmp_path / "made/checkpoints").exists()


def test_what_was_kept_is_the_loss_of_each_step(trained_dir: Path) -> None:
    rows = [json.loads(line) for line in (trained_dir / loop.LOG).read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0].keys() == {"step", "loss", "grad_norm", "learning_rate"}
