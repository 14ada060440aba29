"""run_sd.py with a picture to change, a mask, and adapters."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file

from runners.cli import UserError
from runners.images import read_picture
from tests.original_checkpoint import save_original

PROMPT = ("--prompt", "a red circle")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """72 x 64 pixels in many colours."""
    ramp = np.arange(72 * 64 * 3).reshape(64, 72, 3) % 251
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    """White in its left half."""
    mask = Image.new("L", (72, 64))
    mask.paste(255, (0, 0, 36, 64))
    mask.save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


@pytest.fixture
def adapter(tiny_sd: StableDiffusionPipeline, tmp_path: Path) -> Path:
    """A LoRA of the UNet with random weights."""
    torch.manual_seed(0)
    tiny_sd.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = get_peft_model_state_dict(tiny_sd.unet)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, weight_name="style.safetensors")
    return tmp_path / "style.safetensors"


def read_report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def drawn(folder: Path) -> np.ndarray:
    [entry] = read_report(folder)["images"]
    return np.asarray(Image.open(folder / entry["file"]).convert("RGB")).astype(int)


def test_a_picture_is_changed_as_far_as_the_strength_says(run_sd: Callable, tmp_path: Path, picture: Path) -> None:
    before = np.asarray(Image.open(picture)).astype(int)
    distances = []
    for strength in (0.25, 1.0):
        outcome = run_sd(*PROMPT, "--image", picture, "--strength", strength, "--steps", 4)
        assert outcome.code == 0, outcome.err
        after = drawn(tmp_path / "out")
        assert after.shape == before.shape
        distances.append(np.abs(after - before).mean())
    settings = read_report(tmp_path / "out")["settings"]
    assert (settings["image"], settings["strength"]) == (str(picture), 1.0)
    assert (settings["height"], settings["width"]) == (64, 72)
    assert distances[0] != distances[1]


def test_a_mask_keeps_what_is_black(run_sd: Callable, tmp_path: Path, picture: Path, mask: Path) -> None:
    before = np.asarray(Image.open(picture)).astype(int)
    for strength in (0.5, 1.0):
        outcome = run_sd(*PROMPT, "--image", picture, "--mask", mask, "--strength", strength, "--steps", 4)
        assert outcome.code == 0, outcome.err
        masked = drawn(tmp_path / "out")
        assert np.array_equal(masked[:, 36:], before[:, 36:])
        assert np.abs(masked[:, :36] - before[:, :36]).mean() > 10


def test_a_picture_is_read_as_viewers_show_it(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64 * 32).reshape(32, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    shown = np.asarray(read_picture("--image", tmp_path / "deep.png").convert("RGB"))
    assert abs(np.median(shown) - 127) <= 1 and shown.max() == 255
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: the top is on the right
    Image.new("RGB", (64, 32)).save(tmp_path / "phone.jpg", exif=turned)
    assert read_picture("--image", tmp_path / "phone.jpg").size == (32, 64)
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(UserError, match="float.tiff has values of 32 bits"):
        read_picture("--image", tmp_path / "float.tiff")


def test_pictures_go_with_the_accelerations(run_sd: Callable, tmp_path: Path, picture: Path) -> None:
    outcome = run_sd(
        *PROMPT, "--image", picture, "--strength", 0.8, "--steps", 10, "--FA", "--TOME", "--DC", 2, "--compare"
    )
    assert outcome.code == 0, outcome.err
    report = read_report(tmp_path / "out")
    assert (report["flags"]["DC"]["full_steps"], report["flags"]["DC"]["shallow_steps"]) == (4, 4)
    assert (tmp_path / "out/comparison.png").exists()


def test_a_size_resizes_the_picture(run_sd: Callable, tmp_path: Path, picture: Path) -> None:
    assert run_sd(*PROMPT, "--image", picture, "--height", 128, "--width", 96).code == 0
    assert drawn(tmp_path / "out").shape == (128, 96, 3)


def test_adapters_change_the_picture_by_their_scale(run_sd: Callable, tmp_path: Path, adapter: Path) -> None:
    pictures = {}
    for lora in ((), ("--lora", adapter), ("--lora", f"{adapter}:0"), ("--lora", f"{adapter}:0.5")):
        outcome = run_sd(*PROMPT, "--FA", *lora)
        assert outcome.code == 0, outcome.err
        pictures[str(lora[-1:])] = drawn(tmp_path / "out")
    plain, whole, none, half = pictures.values()
    assert np.array_equal(plain, none) and not np.array_equal(plain, whole) and not np.array_equal(whole, half)
    assert read_report(tmp_path / "out")["settings"]["lora"] == {str(adapter): 0.5}
    both = run_sd(*PROMPT, "--lora", f"{adapter}:0.25", "--lora", f"{adapter}:0.25")
    assert both.code == 0, both.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mask", "mask.png"], "--mask has no effect without --image"),
        (["--strength", "0.5"], "--strength has no effect without --image"),
        (["--image", "absent.png"], "--image absent.png: No such file or directory"),
        (["--image", __file__], "is no picture that can be read"),
        (["--image", "PICTURE", "--strength", "0"], "must be more than 0 and at most 1, not 0"),
        (["--image", "PICTURE", "--strength", "0.1"], "--strength 0.1 of --steps 2 leaves no step"),
        (["--image", "PICTURE", "--mask", "BLACK"], "is all black: nothing would change"),
        (["--lora", "absent.safetensors"], "--lora absent.safetensors does not exist"),
        (["--lora", __file__], "must be a .safetensors file"),
        (["--lora", "OTHER"], "does not fit this model"),
        (["--lora", "FLUX"], "flux.safetensors does not fit this model: none of its weights"),
        (["--lora", "PARTLY"], "no place of their shape for unet.mid_block.absent.lora_A.weight, "),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    run_sd: Callable, tmp_path: Path, picture: Path, tiny_sd_dir: Path, arguments: list[str], message: str
) -> None:
    Image.new("L", (72, 64)).save(tmp_path / "black.png")
    adapter = {f"transformer.x.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
    save_file(adapter, tmp_path / "flux.safetensors")
    query = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    partly = {f"{query}.lora_A.weight": torch.ones(4, 64), f"{query}.lora_B.weight": torch.ones(64, 4)}
    partly |= {f"unet.mid_block.absent.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
    save_file(partly, tmp_path / "partly.safetensors")
    paths = {
        "PICTURE": picture,
        "BLACK": tmp_path / "black.png",
        "FLUX": tmp_path / "flux.safetensors",
        "PARTLY": tmp_path / "partly.safetensors",
        "OTHER": tiny_sd_dir / "vae/diffusion_pytorch_model.safetensors",
    }
    outcome = run_sd(*PROMPT, *(paths.get(argument, argument) for argument in arguments))
    assert outcome.code == 2 and message in outcome.err.splitlines()[-1], outcome.err


def test_weights_of_words_change_a_picture_and_plain_prompts_stay(run_sd: Callable, tmp_path: Path) -> None:
    pictures = []
    for prompt, flags in (
        ("a red circle", ()),
        ("a red circle", ("--prompt_weights",)),
        ("a (red)1.5 circle", ("--prompt_weights",)),
        ("a (red)0.5 circle", ("--prompt_weights",)),
    ):
        outcome = run_sd("--prompt", prompt, "--negative_prompt", "a blue square", *flags)
        assert outcome.code == 0, outcome.err
        pictures.append(drawn(tmp_path / "out"))
    plain, read, more, less = pictures
    assert np.abs(plain - read).max() <= 1  # compel normalizes the weight of the whole prompt, 1, in float32
    assert not np.array_equal(more, read) and not np.array_equal(less, read) and not np.array_equal(more, less)
    assert read_report(tmp_path / "out")["settings"]["prompt_weights"] is True


def test_the_end_of_a_long_prompt_counts_where_compel_reads_it(run_sd: Callable, tmp_path: Path) -> None:
    for flags, counts in (((), False), (("--prompt_weights", "--FA", "--TOME", "--DC"), True)):
        pictures = []
        for end in ("red circle", "blue square"):
            outcome = run_sd("--prompt", f"{'a picture of many words, ' * 6} {end}", *flags)
            assert outcome.code == 0, outcome.err
            pictures.append(drawn(tmp_path / "out"))
            assert ("is cut after 77" in outcome.err) is not counts
        assert np.array_equal(*pictures) is not counts


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ('a ("cat").swap("dog")', "uses .swap()"),
        ('("a cat", "a dog").blend(1)', 'compel cannot read \'("a cat"'),
        ("()1.3", "has no words"),
        ('("a", "b").blend(1, -1)', "sum to 0"),
        ("a (blue:1.4) circle", "'(blue:1.4)' is no weight to compel"),
        ("a cat withLora(style, 0.5)", "names an adapter: give it by --lora"),
    ],
)
def test_a_prompt_that_compel_cannot_carry_out_is_one_line(run_sd: Callable, prompt: str, message: str) -> None:
    outcome = run_sd("--prompt", prompt, "--prompt_weights")
    assert outcome.code == 2 and message in outcome.err.splitlines()[-1], outcome.err


def test_streamed_models_draw_the_same_picture(run_sd: Callable, tmp_path: Path) -> None:
    pictures = []
    for memory in ("resident", "stream", "disk"):
        outcome = run_sd(*PROMPT, "--memory", memory, "--FA", "--TOME", "--DC", 2)
        assert outcome.code == 0, outcome.err
        assert bool(re.search(r"unet +\S+ MiB +streamed", outcome.out)) == (memory != "resident")
        pictures.append(drawn(tmp_path / "out"))
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "stream", "--memory_limit", "1K"], "no placement fits: the smallest takes"),
        (["--memory", "disk", "--dtype", "float16"], "cannot come from disk in float16: "),
    ],
)
def test_memory_that_does_not_do_is_one_line(run_sd: Callable, arguments: list[str], message: str) -> None:
    outcome = run_sd(*PROMPT, *arguments)
    assert outcome.code == 2 and message in outcome.err.splitlines()[-1], outcome.err


def test_a_checkpoint_in_one_file_draws_what_its_folder_draws(
    run_sd: Callable, tmp_path: Path, tiny_sd: StableDiffusionPipeline, tiny_sd_dir: Path
) -> None:
    save_original(tiny_sd, tmp_path / "model.safetensors")
    pictures = []
    for model in ((), ("--model_path", tmp_path / "model.safetensors", "--config", tiny_sd_dir)):
        outcome = run_sd(*PROMPT, *model)
        assert outcome.code == 0, outcome.err
        pictures.append(drawn(tmp_path / "out"))
    assert np.array_equal(*pictures)


def test_a_model_that_predicts_velocity_draws_as_in_diffusers(
    run_sd: Callable, tmp_path: Path, tiny_sd: StableDiffusionPipeline
) -> None:
    """As SD2.1 for 768 pixels does, also with another scheduler."""
    tiny_sd.scheduler = DPMSolverMultistepScheduler.from_config(
        tiny_sd.scheduler.config, prediction_type="v_prediction"
    )
    tiny_sd.unet.register_to_config(sample_size=24)
    tiny_sd.save_pretrained(tmp_path / "model")
    expected = tiny_sd("a red circle", num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images[0]
    outcome = run_sd(*PROMPT, "--model_path", tmp_path / "model", "--steps", 4, "--scheduler", "dpm++")
    assert outcome.code == 0, outcome.err
    assert np.array_equal(drawn(tmp_path / "out"), np.asarray(expected).astype(int))
    assert expected.size == (192, 192)
