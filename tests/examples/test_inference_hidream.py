"""HiDream-E1's runners from their command line to their files, with a tiny random model."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import HiDreamImageEditingPipeline, HiDreamImageTransformer2DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors.torch import load_file, save_file

from runners.hidream import run as program
from runners.hidream.arguments import E1_1, E1_FULL
from runners.hidream.editing import prompt_of
from runners.hidream.edits import Edit
from tests.chat_server import Endpoint
from tests.examples.conftest import Outcome
from tests.hidream_adapters import add_adapter, full_of, save_original
from tests.tiny_hidream import make_components, make_transformer

KEYS = {
    "instruction",
    "negative_instruction",
    "guidance_scale",
    "img_guidance_scale",
    "steps",
    "refine_strength",
    "clip_cfg_norm",
    "seed",
    "input_image",
    "original_size",
    "processed_size",
}


@pytest.fixture(scope="session")
def tiny_hidream_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline with what refines. Read only: copy it before you change it."""
    folder = tmp_path_factory.mktemp("models") / "hidream"
    HiDreamImageEditingPipeline(**make_components()).save_pretrained(folder)
    make_transformer(seed=7).save_pretrained(folder / "refiner")
    (folder / "defaults.json").write_text(json.dumps({"side": 64, "guidance_scale": 3.0}))
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (50, 90, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def edit(tiny_hidream_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs inference_e1_1_npu.py with the tiny model into tmp_path/out."""

    def run(*arguments: object, model: Path = tiny_hidream_dir) -> Outcome:
        options = ["--model_path", model, "--device", "cpu", "--steps", 3, "--output_dir", tmp_path / "out"]
        code = 0
        try:
            program.main("inference_e1_1_npu.py", "", E1_1, tmp_path, [str(a) for a in [*options, *arguments]])
        except SystemExit as end:
            code = end.code
        return Outcome(code, *capfd.readouterr())

    return run


def test_a_result_is_as_large_as_its_picture_and_says_how_it_was_made(
    edit: Callable[..., Outcome], photo: Path, tmp_path: Path
) -> None:
    wanted = ["--image", photo, "--instruction", "make the circle blue", "--target_description", "a blue circle"]
    assert edit(*wanted).code == 0
    about = json.loads((tmp_path / "out/photo.json").read_text())
    assert about.keys() >= KEYS and about["guidance_scale"] == 3.0 and about["original_size"] == [90, 50]
    with Image.open(tmp_path / "out/photo.png") as result:
        assert result.size == (90, 50) and json.loads(result.text["instruction"]) == "make the circle blue"
        first = np.asarray(result)
    again = edit(*wanted)
    assert again.code == 0 and "1 of 1 results are there already" in again.out
    assert "of another picture, instruction or setting" in edit(*wanted, "--seed", 4).err
    shutil.rmtree(tmp_path / "out")
    assert edit(*wanted, "--FA").code == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out/photo.png")), first)  # off the NPU the same to the bit
    shutil.rmtree(tmp_path / "out")
    assert edit(*wanted, "--refine_strength", 0).code == 0
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "out/photo.png")), first)


@pytest.fixture
def drawing_dir(tiny_hidream_dir: Path, tmp_path: Path) -> Path:
    """As HiDream-I1-Full: a model that draws, without what refines."""
    model = shutil.copytree(tiny_hidream_dir, tmp_path / "I1-Full", ignore=shutil.ignore_patterns("refiner"))
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"_class_name": "HiDreamImagePipeline"}))
    return model


@pytest.fixture
def e1_full(tmp_path: Path) -> Path:
    """As HiDream-E1-Full.safetensors."""
    bare = make_transformer()
    return save_original(tmp_path / "E1-Full.safetensors", add_adapter(make_transformer()), full_of(bare))


def test_one_transformer_edits_with_an_adapter_and_refines_without(
    edit: Callable[..., Outcome],
    photo: Path,
    drawing_dir: Path,
    e1_full: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[int, bool]] = []
    forward = HiDreamImageTransformer2DModel.forward

    def record(model: HiDreamImageTransformer2DModel, hidden_states: torch.Tensor, **arguments: Any) -> Any:
        layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
        if not hidden_states.is_meta:  # on which the planner runs it dry
            assert len(layers) == 65 + 3 and len({layer.disable_adapters for layer in layers}) == 1
            calls.append((len(hidden_states), not layers[0].disable_adapters))
        return forward(model, hidden_states, **arguments)

    monkeypatch.setattr(HiDreamImageTransformer2DModel, "forward", record)
    wanted = ["--image", photo, "--instruction", "make it blue", "--target_description", "a circle", "--steps", 4]
    given = [*wanted, "--edit_lora", e1_full, "--refine_strength", 0.5]
    results = []
    for options in ([], ["--FA"], ["--FA", "--memory", "stream"], ["--memory", "disk"]):
        calls.clear()
        outcome = edit(*given, *options, model=drawing_dir)
        assert outcome.code == 0, outcome.err
        assert calls == [(3, True)] * 2 + [(2, False)] * 2
        about = json.loads((tmp_path / "out/photo.json").read_text())
        assert about["edit_lora"] == {str(e1_full): 1.0}
        results.append(np.asarray(Image.open(tmp_path / "out/photo.png")).astype(int))
        shutil.rmtree(tmp_path / "out")
    assert all(np.abs(result - results[0]).max() <= 1 for result in results)
    assert edit(*given).code == 0  # with a refiner in the model's folder, which --edit_lora leaves out
    shutil.rmtree(tmp_path / "out")
    assert edit(*given[:-2], "--refine_strength", 0, model=drawing_dir).code == 0
    edited = np.asarray(Image.open(tmp_path / "out/photo.png")).astype(int)
    assert np.abs(edited - results[0]).max() > 10
    assert "of another picture, instruction or setting" in edit(*given, model=drawing_dir).err


def test_other_adapters_change_what_edits(
    edit: Callable[..., Outcome], photo: Path, drawing_dir: Path, e1_full: Path, tmp_path: Path
) -> None:
    wanted = ["--image", photo, "--instruction", "make it blue", "--target_description", "a circle"]
    style = save_original(tmp_path / "style.safetensors", add_adapter(make_transformer(), seed=3), {})
    results = []
    for lora in ([], ["--lora", f"{style}:0.5"], ["--lora", f"{style}:0.5", "--lora", f"{e1_full}:0.1"]):
        outcome = edit(*wanted, *lora)
        assert outcome.code == 0 and ("refining goes without the adapters" in outcome.err) == bool(lora)
        results.append(np.asarray(Image.open(tmp_path / "out/photo.png")))
        about = json.loads((tmp_path / "out/photo.json").read_text())
        shutil.rmtree(tmp_path / "out")
    assert about["lora"] == {str(style): 0.5, str(e1_full): 0.1}
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(results, 2))
    (tmp_path / "cut.safetensors").write_bytes(style.read_bytes()[:-10])
    save_file({"unet.mid.lora_A.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    for options, message in (
        (["--lora", "absent.safetensors"], "--lora absent.safetensors does not exist"),
        (["--edit_lora", photo], "--edit_lora .*photo.jpg must be a .safetensors file"),
        (["--lora", tmp_path / "cut.safetensors"], "cut.safetensors are damaged"),
        (["--edit_lora", tmp_path / "other.safetensors"], "--edit_lora .*one of two matrices only.*unet.mid"),
        (["--lora", f"{style}:strong"], "argument --lora"),
    ):
        outcome = edit(*wanted, *options)
        assert outcome.code == 2 and re.search(message, outcome.err) and "Traceback" not in outcome.err
    assert "holds a HiDreamImagePipeline, which draws: --edit_lora names" in edit(*wanted, model=drawing_dir).err


def test_a_step_cache_leaves_blocks_out_and_is_told(edit: Callable[..., Outcome], photo: Path, tmp_path: Path) -> None:
    wanted = ["--image", photo, "--instruction", "x", "--refine_strength", 0, "--steps", 6]
    assert edit(*wanted).code == 0
    plain = np.asarray(Image.open(tmp_path / "out/photo.png"))
    assert "of another picture, instruction or setting" in edit(*wanted, "--step_cache", "taylorseer").err
    shutil.rmtree(tmp_path / "out")
    outcome = edit(*wanted, "--step_cache", "taylorseer", "--FA")
    assert outcome.code == 0 and "4 of 6 steps were computed in full" in outcome.out
    about = json.loads((tmp_path / "out/photo.json").read_text())
    assert about["step_cache"] == ["taylorseer", 3] and about["full_steps"] == 4
    assert json.loads((tmp_path / "out/report.json").read_text())["full_steps"] == {"photo": 4}
    cached = np.asarray(Image.open(tmp_path / "out/photo.png"))
    assert not np.array_equal(cached, plain)
    shutil.rmtree(tmp_path / "out")
    outcome = edit(*wanted, "--step_cache", "taylorseer:3", "--memory", "stream")
    assert outcome.code == 0 and "blocks that are left out are brought to the device all the same" in outcome.err
    assert np.abs(np.asarray(Image.open(tmp_path / "out/photo.png")).astype(int) - cached).max() <= 1


@pytest.mark.parametrize("value", ["taylorseer:1", "taylorseer:2.5", "first_block:0", "first_block:x", "second_block"])
def test_a_step_cache_out_of_range_is_one_line(edit: Callable[..., Outcome], photo: Path, value: str) -> None:
    outcome = edit("--image", photo, "--instruction", "x", "--step_cache", value)
    assert outcome.code == 2 and "argument --step_cache: " in outcome.err and "Traceback" not in outcome.err


def test_folders_and_files_of_edits(edit: Callable[..., Outcome], photo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.jpg"):
        Image.open(photo).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    outcome = edit("--image", folder, "--instruction", "remove the square")
    assert outcome.code == 0 and "goes towards the instruction" in outcome.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a.json",
        "a.png",
        "b.json",
        "b.png",
        "report.json",
    ]
    rows = [
        {"image": "photo.jpg", "instruction": "make the circle blue", "target_description": "a circle", "id": "x"},
        {"image": "photos/a.png", "instruction": "remove it", "target_description": "nothing", "seed": 9},
    ]
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert edit("--edits", tmp_path / "edits.jsonl").code == 0
    assert json.loads((tmp_path / "out/00002_a.json").read_text())["seed"] == 9
    assert (tmp_path / "out/x.png").exists()


def test_a_language_model_words_the_instruction(
    edit: Callable[..., Outcome], endpoint: Endpoint, photo: Path, tmp_path: Path
) -> None:
    pytest.importorskip("openai", reason="refining instructions needs openai, see requirements_npu.txt")
    wanted = ["--image", photo, "--instruction", "make it blue", "--refine_instruction", "m"]
    assert edit(*wanted).code == 0
    about = json.loads((tmp_path / "out/photo.json").read_text())
    assert about["instruction"] == "Make the circle blue." and about["original_instruction"] == "make it blue"
    assert about["target_description"] == "A blue circle on white."
    assert edit(*wanted).code == 0 and len(endpoint.requests) == 1  # what is there is not asked for again
    shutil.rmtree(tmp_path / "out")
    endpoint.answers = ["no three lines"]
    outcome = edit(*wanted)
    assert outcome.code == 1 and "something else than three lines" in outcome.err
    assert not (tmp_path / "out/photo.png").exists()


def test_refining_is_switched_off(edit: Callable[..., Outcome], photo: Path, tmp_path: Path) -> None:
    wanted = ["--image", photo, "--instruction", "x"]
    assert edit(*wanted, "--no-refine").code == 0
    assert json.loads((tmp_path / "out/photo.json").read_text())["refine_strength"] == 0
    shutil.rmtree(tmp_path / "out")
    assert edit(*wanted, "--refine").code == 0
    assert json.loads((tmp_path / "out/photo.json").read_text())["refine_strength"] == 0.3


def broken(folder: Path) -> Path:
    (folder / "broken.png").write_bytes(b"no picture")
    return folder / "broken.png"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--instruction", "x"], "--image and --instruction say what to edit"),
        (["--image", "PHOTO", "--instruction", " "], "--instruction must not be empty"),
        (["--image", "absent.png", "--instruction", "x"], "cannot read the picture absent.png"),
        (["--image", "BROKEN", "--instruction", "x"], "broken.png"),
        (["--image", "FOLDER", "--instruction", "x"], "holds no picture to edit"),
        (["--image", "PHOTO", "--image", "PHOTO", "--instruction", "x"], "two results called photo"),
        (["--image", "PHOTO", "--instruction", "x", "--refine_strength", "2"], "must be from 0 to 1, not 2"),
        (
            ["--image", "PHOTO", "--instruction", "x", "--no-refine", "--refine_strength", "0.2"],
            "--no-refine contradicts --refine_strength 0.2",
        ),
        (
            ["--image", "PHOTO", "--instruction", "x", "--refine", "--refine_strength", "0"],
            "--refine contradicts --refine_strength 0",
        ),
        (["--image", "PHOTO", "--edits", "EDITS"], "--edits names pictures and instructions"),
        (["--edits", "EDITS"], "line 1 must be as"),
        (["--edits", "absent.jsonl"], "absent.jsonl"),
    ],
)
def test_bad_input_is_one_line(
    edit: Callable[..., Outcome], photo: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "edits.jsonl").write_text('{"image": "photo.jpg"}')
    names = {
        "PHOTO": photo,
        "BROKEN": broken(tmp_path),
        "FOLDER": tmp_path / "empty",
        "EDITS": tmp_path / "edits.jsonl",
    }
    outcome = edit(*(names.get(argument, argument) for argument in arguments))
    assert outcome.code == 2 and message in outcome.err and "Traceback" not in outcome.err
    assert not list(tmp_path.glob("out/*.png"))


def test_models_that_lack_something(
    edit: Callable[..., Outcome], photo: Path, tiny_hidream_dir: Path, tiny_sd_dir: Path, tmp_path: Path
) -> None:
    wanted = ["--image", photo, "--instruction", "x"]
    assert "holds a StableDiffusionPipeline" in edit(*wanted, model=tiny_sd_dir).err
    model = shutil.copytree(tiny_hidream_dir, tmp_path / "model")
    shutil.rmtree(model / "refiner")
    assert "--refiner_path names the folder of HiDream-I1-Full's" in edit(*wanted, model=model).err
    llama = tmp_path / "llama"
    llama.mkdir()
    for name in ("text_encoder_4", "tokenizer_4"):
        for file in (model / name).iterdir():
            shutil.copy(file, llama)
        shutil.rmtree(model / name)
    without = [*wanted, "--refine_strength", 0]
    outcome = edit(*without, model=model)
    assert outcome.code == 2 and "no text_encoder_4 and no tokenizer_4: --llama_path names" in outcome.err
    assert edit(*without, "--llama_path", llama, model=model).code == 0
    weights = model / "transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "are damaged" in edit(*without, "--llama_path", llama, model=model).err


def test_prompts_are_as_the_models_were_trained() -> None:
    edit = Edit(Path("a.png"), "Make it night.", "A night.", 0, "a")
    assert prompt_of(edit, E1_1.prompt) == "Make it night."
    expected = "Editing Instruction: Make it night. Target Image Description: A night."
    assert prompt_of(edit, E1_FULL.prompt) == expected


@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        ("text_encoder_4/model.safetensors", "model.layers.0.mlp.down_proj.weight"),
        ("transformer/diffusion_pytorch_model.safetensors", "x_embedder.proj.weight"),
        ("refiner/diffusion_pytorch_model.safetensors", "final_layer.linear.bias"),
    ],
)
def test_a_tensor_that_a_file_lacks_is_named(
    edit: Callable[..., Outcome], tiny_hidream_dir: Path, photo: Path, tmp_path: Path, file: str, tensor: str
) -> None:
    model = shutil.copytree(tiny_hidream_dir, tmp_path / "model")
    tensors = load_file(model / file)
    del tensors[tensor]
    save_file(tensors, model / file, {"format": "pt"})
    outcome = edit("--image", photo, "--instruction", "make it blue", model=model)
    assert outcome.code == 2 and tensor in outcome.err and "Traceback" not in outcome.err
    assert not (tmp_path / "out/photo.png").exists()


def test_a_changed_configuration_is_another_setting(
    edit: Callable[..., Outcome], tiny_hidream_dir: Path, photo: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_hidream_dir, tmp_path / "model")
    wanted = ["--image", photo, "--instruction", "make it blue", "--no-refine"]
    assert edit(*wanted, model=model).code == 0
    (model / "defaults.json").write_text(
        json.dumps({"side": 64, "guidance_scale": 3.0, "prompt": "not {instruction}"})
    )
    assert "of another picture, instruction or setting" in edit(*wanted, model=model).err
    for defaults in ({"prompt": "{foo}"}, {"side": "64"}, {"guidance_scale": "x"}):
        (model / "defaults.json").write_text(json.dumps(defaults))
        assert "defaults.json must hold" in edit(*wanted, model=model).err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"target_description": 5}, "target_description must be a text"),
        ({"id": "a\u0000b"}, "names no file"),
        ({"id": "report"}, "would be overwritten"),
        ({"instruction": "x\ud800"}, "surrogates not allowed"),
        ({"seed": 2**70}, "below 2^63"),
    ],
)
def test_bad_rows_are_found_before_anything_is_loaded(
    edit: Callable[..., Outcome], photo: Path, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    rows = tmp_path / "edits.jsonl"
    rows.write_text(json.dumps({"image": photo.name, "instruction": "make it blue"} | row))
    outcome = edit("--edits", rows)
    assert outcome.code == 2 and message in outcome.err and "Traceback" not in outcome.err


def test_a_picture_for_which_memory_runs_out_is_made_by_the_same_command_later(
    edit: Callable[..., Outcome], photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copy(photo, tmp_path / "other.jpg")
    wanted = ["--image", photo, "--image", other, "--instruction", "make it blue", "--no-refine"]
    edit_picture = program.edit_picture

    def starve(edit: Edit, *given: Any) -> Any:
        if edit.name == "photo":
            raise torch.OutOfMemoryError("no memory is left")
        return edit_picture(edit, *given)

    monkeypatch.setattr(program, "edit_picture", starve)
    outcome = edit(*wanted)
    assert outcome.code == 1 and "out of memory" in outcome.err and "Traceback" not in outcome.err
    assert json.loads((tmp_path / "out/report.json").read_text())["failures"] == {"photo": "out of memory"}
    assert (tmp_path / "out/other.json").exists() and not (tmp_path / "out/photo.png").exists()
    monkeypatch.undo()
    again = edit(*wanted)
    assert (
        again.code == 0 and "1 of 2 results are there already" in again.out and (tmp_path / "out/photo.png").exists()
    )
