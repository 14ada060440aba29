"""A CLIP as ONNX files that compute what it does, and what becomes of them when something fails."""

import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ascend.atc import AtcError
from runners.cli import UserError
from runners.clip import CLIPInferenceService
from runners.clip.checkpoint import load_processor
from runners.offline.converter import ModelConverter, convert_clip, save_processor
from runners.offline.export import check_onnx, export_onnx
from runners.offline.folder import OM, ONNX, read_folder
from runners.offline.run import main
from tests.programs import full_disk
from tests.tiny_clip import save_tiny_clip, save_tiny_siglip

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

TEXTS = ["a cat", "a dog on a red sofa", "one two three four five"]
ATC = """#!/bin/sh
for each in "$@"; do case $each in --output=*) out=${each#--output=};; esac; done
printf '%s\\n' "$@" >> "$ARGUMENTS"
case "$out" in *$FAILING*) echo "E40000: no kernel"; exit 1;; esac
head -c $SIZE /dev/zero > "$out".om || { echo "E13004: no space"; exit 1; }
"""


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("models") / "clip")


@contextmanager
def script_for_atc(folder: Path, failing: str = "nothing", size: int = 6) -> Iterator[Path]:
    """A script in atc's place, which fails for that name, and makes files of that many bytes.

    Gives a file with the arguments of each call.
    """
    path = folder / "bin/atc"
    path.parent.mkdir()
    path.write_text(ATC)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("ARGUMENTS", str(folder / "arguments"))
        patch.setenv("FAILING", failing)
        patch.setenv("SIZE", str(size))
        yield folder / "arguments"


@pytest.fixture
def arguments(tmp_path: Path) -> Iterator[Path]:
    with script_for_atc(tmp_path) as path:
        yield path


@dataclass
class Exported:
    """Of any batch, with the arguments that atc got."""

    folder: Path
    arguments: list[str]
    result: dict[str, Any]


@pytest.fixture(scope="module")
def exported(clip_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("exported")
    with script_for_atc(folder) as path:
        result = ModelConverter("Ascend310P3").convert_clip_model(str(clip_dir), folder / "om", dynamic_batch=True)
        return Exported(folder / "om", path.read_text().splitlines(), result)


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)) for _ in range(count)]


def same_answers(folder: Path, reference: Path) -> None:
    """11 pictures: profiles of 8, 4 (filled up)."""
    ours = CLIPInferenceService(str(folder), backend="onnx", device="cpu")
    theirs = CLIPInferenceService(str(reference), device="cpu")
    assert ours.device == "cpu" and ours.scoring == theirs.scoring
    for one, other in zip(
        ours.batch_predict(pictures(11), TEXTS, 11), theirs.batch_predict(pictures(11), TEXTS), strict=True
    ):
        np.testing.assert_allclose(one["logits"], other["logits"], atol=1e-3)
        assert len(one["probabilities"]) == len(TEXTS)  # whatever the batch of the files


def test_both_towers_answer_as_the_model(exported: Exported, clip_dir: Path) -> None:
    same_answers(exported.folder, clip_dir)
    assert {path.name for path in exported.folder.iterdir()} >= {
        "image_tower.onnx",
        "text_tower.onnx",
        "model_config.json",
    }
    assert not list(exported.folder.glob(".*"))
    config = json.loads((exported.folder / "model_config.json").read_text())
    assert config.keys() >= {"batch_size", "image_size", "text_length", "dynamic_batch", "soc_version"}
    assert max(config["onnx_error"].values()) < 1e-4


def test_files_hold_what_cann_reads(exported: Exported) -> None:
    for tower, shape in (("image_tower", [3, 32, 32]), ("text_tower", [77])):
        model = onnx.load(exported.folder / f"{tower}.onnx")
        assert [(o.domain, o.version) for o in model.opset_import if o.domain == ""] == [("", 18)]
        (given,), (result,) = model.graph.input, model.graph.output  # and no hidden states of every layer
        assert result.name == tower.replace("tower", "features")
        assert [d.dim_value for d in given.type.tensor_type.shape.dim][1:] == shape
        assert given.type.tensor_type.shape.dim[0].dim_param
        # its parser overlooks start and end, and the guard of torch's fused attention is for masks that CLIP lacks
        assert not any(node.op_type == "Shape" and node.attribute for node in model.graph.node)
        assert not {"IsNaN", "Trilu"} & {node.op_type for node in model.graph.node}


@pytest.mark.slow
def test_a_fixed_batch_of_siglip_in_the_older_opset(tmp_path: Path) -> None:
    siglip = save_tiny_siglip(tmp_path / "siglip")
    convert_clip(None, str(siglip), tmp_path / "out", batch_size=4, opset=17)
    same_answers(tmp_path / "out", siglip)
    for tower in ("image_tower", "text_tower"):
        model = onnx.load(tmp_path / f"out/{tower}.onnx")
        assert [o.version for o in model.opset_import if o.domain == ""] == [17]
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 4


def test_offline_models_of_both_towers(exported: Exported) -> None:
    result = exported.result
    assert result["success"] and result["config"]["soc_version"] == "Ascend310P3"
    assert all(Path(path).is_file() for paths in (result["onnx_path"], result["om_path"]) for path in paths.values())
    assert json.loads((exported.folder / "model_config.json").read_text()) == result["config"]
    assert {"--input_shape=pixel_values:-1,3,32,32", "--dynamic_batch_size=1,2,4,8"} <= {*exported.arguments}
    assert {"--input_shape=input_ids:-1,77", "--dynamic_dims=1;2;4;8"} <= {*exported.arguments}


@pytest.mark.slow
def test_aipp_makes_of_bytes_what_the_processor_makes(clip_dir: Path, tmp_path: Path, arguments: Path) -> None:
    result = ModelConverter("Ascend310P3").convert_clip_model(str(clip_dir), tmp_path / "om", aipp=True)
    assert result["config"]["image_tower"]["takes_bytes"] and not result["config"]["text_tower"]["takes_bytes"]
    lines = dict(line.strip().split(": ") for line in (tmp_path / "om/aipp.cfg").read_text().splitlines()[1:-1])
    assert lines["input_format"] == "RGB888_U8" and lines["src_image_size_w"] == "32"
    red = (200 - float(lines["min_chn_0"])) * float(lines["var_reci_chn_0"])
    assert red == pytest.approx((200 / 255 - 0.48145466) / 0.26862954, abs=1e-4)
    assert sum("--insert_op_conf" in line for line in arguments.read_text().splitlines()) == 1


@pytest.mark.slow
def test_when_the_second_tower_fails_nothing_is_left_of_the_first(clip_dir: Path, tmp_path: Path) -> None:
    with script_for_atc(tmp_path, failing="text_tower"), pytest.raises(AtcError, match="E40000: no kernel"):
        ModelConverter("Ascend310P3").convert_clip_model(str(clip_dir), tmp_path / "om")
    assert {path.name for path in (tmp_path / "om").iterdir()} == {"image_tower.atc.log", "text_tower.atc.log"}


def test_what_cannot_be_is_refused_before_the_work(
    clip_dir: Path, tmp_path: Path, arguments: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AtcError, match="Ascend910B1"):
        ModelConverter("Ascend910B")
    with pytest.raises(FileNotFoundError):
        ModelConverter("Ascend910B3").convert_onnx_to_om(tmp_path / "none.onnx", tmp_path / "none.om")
    for bad, message in (({"image_size": 224}, "32 pixels"), ({"text_length": 78}, "77 tokens")):
        with pytest.raises(UserError, match=message):
            convert_clip(None, str(clip_dir), tmp_path / "out", **bad)
    with pytest.raises(UserError, match="--batch-size 3"):
        convert_clip(None, str(clip_dir), tmp_path / "out", batch_size=3, dynamic_batch=True)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(AtcError, match="atc is not on PATH"):
        ModelConverter("Ascend310P3")


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, name, options, shape",
    [
        ("vae-decoder", "vae_decoder", ["--height", "64"], [2, 4, 8, 16]),
        ("text-encoder", "text_encoder", [], [2, 77]),
    ],
)
def test_parts_of_stable_diffusion(
    tiny_sd_dir: Path, tmp_path: Path, arguments: Path, command: str, name: str, options: list[str], shape: list[int]
) -> None:
    where = ["--model", str(tiny_sd_dir), "--output-dir", str(tmp_path / "out"), "--soc-version", "Ascend910B3"]
    main("convert_to_om.py", "", [command, *where, "--batch-size", "2", *options])
    config = json.loads((tmp_path / "out/model_config.json").read_text())
    assert list(config["input"].values()) == [shape] and config["soc_version"] == "Ascend910B3"
    assert config["onnx_error"][name] < 1e-4  # of the file in onnxruntime, to the model
    assert (tmp_path / f"out/{name}.om").is_file()
    assert f"--input_shape={next(iter(config['input']))}:{','.join(map(str, shape))}" in arguments.read_text()


@dataclass
class Place:
    limit: int
    message: str


FULL = {
    "export": Place(100_000, "File too large: {out}"),  # a tower has 246 and 282 kB
    "atc": Place(400_000, "atc ended with exit code 1"),
}


@pytest.mark.parametrize("where", FULL)
def test_a_full_disk_leaves_the_conversion_before(
    where: str,
    exported: Exported,
    clip_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported.folder, out)
    line = ["clip", "--model", str(clip_dir), "--output-dir", str(out), "--soc-version", "Ascend310P3"]
    with script_for_atc(tmp_path, size=500_000), full_disk(FULL[where].limit), pytest.raises(SystemExit) as end:
        main("convert_to_om.py", "", line)
    assert end.value.code == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(f"error: {FULL[where].message.format(out=out)}")
    assert (where == "atc") == ("E13004: no space" in said)  # in atc's own words
    files = [path for path in out.iterdir() if not path.name.endswith(".log")]
    assert all(path.read_bytes() == (exported.folder / path.name).read_bytes() for path in files)
    assert read_folder(out, OM) and read_folder(out, ONNX)


def test_a_full_disk_at_the_tokenizer(clip_dir: Path, tmp_path: Path) -> None:
    """Of which tokenizers tells by an exception that is of no kind."""
    processor = load_processor(str(clip_dir))
    with full_disk(after=1000), pytest.raises(OSError, match="File too large"):
        save_processor(processor, tmp_path)


def test_what_is_for_offline_models_is_not_overlooked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["clip", "--output-dir", str(tmp_path), "--onnx-only", "--aipp", "--soc-version", "Ascend310P3"]
    with pytest.raises(SystemExit) as end:
        main("convert_to_om.py", "", line)
    assert end.value.code == 2
    assert "--soc-version, --aipp: for offline models, before which --onnx-only stops" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["clip", "vae-decoder", "text-encoder"])
def test_a_path_that_atc_does_not_take_is_told_before_a_model_is_loaded(
    command: str, tmp_path: Path, arguments: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [command, "--model", str(tmp_path / "absent"), "--output-dir", str(tmp_path / "my models")]
    with pytest.raises(SystemExit) as end:
        main("convert_to_om.py", "", [*line, "--soc-version", "Ascend310P3"])
    assert end.value.code == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert "my models', which has ' '" in error and not arguments.exists()


def test_a_file_that_differs_is_refused(tmp_path: Path) -> None:
    module, inputs = nn.Linear(3, 2), {"x": torch.randn(4, 3)}
    export_onnx(module, inputs, ["y"], tmp_path / "linear.onnx")
    assert check_onnx(tmp_path / "linear.onnx", module, [inputs]) < 1e-6
    nn.init.zeros_(module.bias)
    with pytest.raises(UserError, match="differs from the model by"):
        check_onnx(tmp_path / "linear.onnx", module, [inputs])


def test_a_module_of_ones_own(tmp_path: Path, arguments: Path) -> None:
    converter, x = ModelConverter("310P3"), torch.randn(4, 3)
    given = (nn.Linear(3, 2), x, tmp_path / "linear.onnx", ["x"], ["y"])
    assert converter.convert_pytorch_to_onnx(*given, dynamic_axes={"x": {0: "batch"}})
    with pytest.raises(ValueError, match="only the first dimension"):
        converter.convert_pytorch_to_onnx(*given, dynamic_axes={"x": {1: "width"}})
    assert converter.convert_onnx_to_om(tmp_path / "linear.onnx", tmp_path / "a/linear", "x:-1,3", "1;2")
    assert (tmp_path / "a/linear.om").is_file()
