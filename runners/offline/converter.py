"""Models to ONNX, and ONNX to offline models, each file compared with its model before it goes on."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ascend.atc import CHIPS_OF, AtcCall, check_path, check_soc_version, find_atc, run_atc
from ascend.device import DeviceError, find_device, get_chip
from runners.cli import UserError
from runners.clip.checkpoint import Scoring, load_model, load_processor, text_length_of
from runners.files import make_output_dir
from runners.offline.export import OPSETS, PACKAGES, check_onnx, export_onnx, require_packages
from runners.offline.folder import OM, ONNX, ExportedClip, ExportedTower, staged
from runners.offline.models import Export, image_export, text_export
from runners.report import versions

PROFILES = (1, 2, 4, 8)  # of --dynamic-batch
AIPP = "aipp.cfg"


def find_soc_version() -> str:
    """The chip of this machine. Raises UserError where there is no NPU."""
    try:
        chip = get_chip(find_device("npu"))
    except DeviceError as error:
        raise UserError(
            f"which chip to convert for is not known ({error}): give --soc-version, what `npu-smi info` shows there "
            "with Ascend in front, as Ascend310P3 or Ascend910B3"
        ) from error
    assert chip is not None
    return chip


class ModelConverter:
    """Makes offline models for one chip.

    Args:
        soc_version: the chip, as "Ascend310P3"; the one of this machine if None.
        precision_mode: of atc, whose default computes in float16.

    Raises:
        AtcError: there is no atc, or that is no chip's name.
        UserError: no chip is named, and there is none.
    """

    # Those that are known here; atc knows more, and refuses what it does not.
    SUPPORTED_SOC = [chip for chips in CHIPS_OF.values() for chip in chips]

    def __init__(self, soc_version: str | None = None, precision_mode: str | None = None) -> None:
        find_atc()
        self.soc_version = check_soc_version(soc_version or find_soc_version())
        self.precision_mode = precision_mode

    def convert_onnx_to_om(
        self,
        onnx_path: str | Path,
        output_path: str | Path,
        input_shape: str | None = None,
        dynamic_dims: str | None = None,
        **kwargs: str,
    ) -> bool:
        """Make the offline model `output_path` of an ONNX file. True; a failure raises.

        Args:
            input_shape: "name:1,3,224,224;other:1,77", with -1 where `dynamic_dims` has values.
            dynamic_dims: "1,1;2,2", a value for each -1 in every profile.
            kwargs: further options of atc.

        Raises:
            FileNotFoundError: there is no `onnx_path`.
            AtcError: atc failed.
        """
        model, output = Path(onnx_path), om_path(Path(output_path))
        if not model.is_file():
            raise FileNotFoundError(2, os.strerror(2), str(model))
        make_output_dir(output.parent)
        call = AtcCall(
            model,
            output,
            self.soc_version,
            parse_shapes(input_shape),
            dynamic_dims=parse_profiles(dynamic_dims),
            precision_mode=self.precision_mode,
            others=kwargs,
        )
        run_atc(call, output.with_suffix(".atc.log"))
        return True

    def convert_pytorch_to_onnx(
        self,
        model: nn.Module,
        dummy_input: Tensor | Sequence[Tensor],
        output_path: str | Path,
        input_names: Sequence[str],
        output_names: Sequence[str],
        dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
        opset_version: int = OPSETS[0],
    ) -> bool:
        """Write `model` as ONNX and compare the file with it. True; a failure raises.

        `dynamic_axes` may leave the first dimension of all inputs open, and no other.

        Raises:
            UserError: the file differs from the model.
            ValueError: other dimensions are asked to be open.
        """
        axes = {axis for each in (dynamic_axes or {}).values() for axis in each}
        if axes - {0}:
            raise ValueError(f"dynamic_axes {sorted(axes)}: only the first dimension, 0, can be left open")
        tensors = [dummy_input] if isinstance(dummy_input, Tensor) else list(dummy_input)
        inputs = dict(zip(input_names, tensors, strict=True))
        require_packages()
        export_onnx(model, inputs, output_names, Path(output_path), opset_version, bool(axes))
        check_onnx(Path(output_path), model, [inputs])
        return True

    def convert_clip_model(
        self,
        model_path: str,
        output_dir: str | Path,
        batch_size: int = 1,
        image_size: int | None = None,
        text_length: int | None = None,
        dynamic_batch: bool = False,
        opset: int = OPSETS[0],
        aipp: bool = False,
    ) -> dict[str, Any]:
        """See `convert_clip`."""
        return convert_clip(
            self, model_path, Path(output_dir), batch_size, image_size, text_length, dynamic_batch, opset, aipp
        )


def convert_clip(
    converter: ModelConverter | None,
    model_path: str,
    output_dir: Path,
    batch_size: int = 1,
    image_size: int | None = None,
    text_length: int | None = None,
    dynamic_batch: bool = False,
    opset: int = OPSETS[0],
    aipp: bool = False,
) -> dict[str, Any]:
    """Write both towers of a CLIP or SigLIP, with what `CLIPInferenceService` needs beside them.

    Args:
        converter: None leaves it at ONNX.
        batch_size: of pictures, and of texts; the service fills up what is fewer and splits what is more.
        image_size, text_length: the model's own if None; another size of pictures is refused.
        dynamic_batch: files of any batch, and offline models with a profile for each of PROFILES.
        aipp: let the offline model take pictures as bytes, and normalise them on the device.

    Returns:
        `success`; `onnx_path` and `om_path`, of each tower; `config`, which CONFIG in `output_dir` holds. The folder
        gets all files or none.
    """
    require_packages()
    if dynamic_batch and batch_size != 1:
        raise UserError(f"--dynamic-batch makes profiles of {PROFILES}: --batch-size {batch_size} has no place there")
    if converter:
        check_folder(output_dir)
    model = load_model(model_path, torch.float32, attn_implementation="eager")
    processor = load_processor(model_path)
    own = model.config.vision_config.image_size
    if image_size not in (None, own):
        raise UserError(f"--image-size {image_size}: the model's pictures have {own} pixels to a side")
    length = text_length or text_length_of(model.config)
    exports = [image_export(model), text_export(model, length)]
    sizes = list(PROFILES) if dynamic_batch else [batch_size]
    with staged(output_dir, [export.name for export in exports]) as stage:
        conf = write_aipp(stage.folder, processor, own) if converter and aipp else None
        made = write_exports(converter, exports, stage.folder, output_dir, sizes, opset, conf)
        save_processor(processor, stage.folder)
        images, texts = (ExportedTower(stage.folder, each.name, each.input, sizes) for each in exports)
        exported = ExportedClip(replace(images, takes_bytes=conf is not None), texts, length, vars(Scoring.of(model)))
        stage.config.update(
            model=model_path,
            model_type=model.config.model_type,
            batch_size=batch_size,
            image_size=own,
            dynamic_batch=dynamic_batch,
            **made,
            **exported.settings(),
        )
    paths = {kind: {e.name: str(output_dir / f"{e.name}.{kind}") for e in exports} for kind in (ONNX, OM)}
    return {
        "success": True,
        "onnx_path": paths[ONNX],
        "om_path": paths[OM] if converter else None,
        "config": stage.config,
    }


def convert_part(
    converter: ModelConverter | None,
    model_path: Path,
    load: Callable[[], Export],
    output_dir: Path,
    batch_size: int,
    opset: int,
) -> str:
    """Write what `load` gives of the pipeline `model_path`, for inputs of that batch, and return its name.

    The folder gets all files or none.
    """
    require_packages()
    if converter:
        check_folder(output_dir)
    export = load()
    with staged(output_dir, [export.name]) as stage:
        made = write_exports(converter, [export], stage.folder, output_dir, [batch_size], opset)
        shape = list(export.examples(batch_size)[0][export.input].shape)
        stage.config.update(
            model=str(model_path), name=export.name, input={export.input: shape}, output=export.output, **made
        )
    return export.name


def check_folder(output_dir: Path) -> None:
    """Raise AtcError, before a model is loaded, where atc will take no file in `output_dir`."""
    for path in (output_dir, output_dir.resolve()):
        check_path(path)


def write_exports(
    converter: ModelConverter | None,
    exports: Sequence[Export],
    folder: Path,
    log_folder: Path,
    sizes: Sequence[int],
    opset: int,
    aipp: Path | None = None,
) -> dict[str, Any]:
    """Write `exports` as ONNX, and with a converter as offline models; what CONFIG says of any conversion.

    `aipp` is for those whose input is pictures.
    """
    errors = {export.name: write_onnx(export, folder, sizes, opset) for export in exports}
    if converter:
        for export in exports:
            write_om(converter, export, folder, log_folder, sizes, aipp)
    return {
        "soc_version": converter.soc_version if converter else None,
        "precision_mode": converter.precision_mode if converter else None,
        "opset": opset,
        "onnx_error": errors,
        "versions": versions(PACKAGES),
    }


def write_onnx(export: Export, folder: Path, sizes: Sequence[int], opset: int) -> float:
    """The largest relative difference from the model over all `sizes`, of which more than one leave the batch open."""
    path = folder / f"{export.name}.{ONNX}"
    is_dynamic = len(sizes) > 1
    example = export.examples(max(sizes))[0]
    export_onnx(export.module, example, [export.output], path, opset, is_dynamic)
    error = check_onnx(path, export.module, [each for size in sizes for each in export.examples(size)])
    print(f"{path.name}: within {error:.1e} of the model, {path.stat().st_size / 1e6:.1f} MB", flush=True)
    return error


def write_om(
    converter: ModelConverter,
    export: Export,
    folder: Path,
    log_folder: Path,
    sizes: Sequence[int],
    aipp: Path | None = None,
) -> None:
    """Of the ONNX file in `folder`. Raises AtcError."""
    shape = list(export.examples(max(sizes))[0][export.input].shape)
    is_picture = len(shape) == 4
    profiles: dict[str, Any] = {}
    if len(sizes) > 1:
        shape[0] = -1
        profiles = {"dynamic_batch_sizes": sizes} if is_picture else {"dynamic_dims": [[size] for size in sizes]}
    call = AtcCall(
        folder / f"{export.name}.{ONNX}",
        folder / f"{export.name}.{OM}",
        converter.soc_version,
        {export.input: shape},
        precision_mode=converter.precision_mode,
        insert_op_conf=aipp if is_picture else None,
        **profiles,
    )
    made = run_atc(call, log_folder / f"{export.name}.atc.log")
    print(f"{made.name}: for {converter.soc_version}, {made.stat().st_size / 1e6:.1f} MB", flush=True)


def save_processor(processor: Any, folder: Path) -> None:
    """What `load_processor` reads."""
    try:
        processor.save_pretrained(folder)
    except Exception as error:  # what tokenizers raises has no class of its own
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def write_aipp(folder: Path, processor: Any, side: int) -> Path:
    """What lets the chip make of bytes what the processor makes: (pixel - min) * var_reci, of each channel."""
    image_processor = processor.image_processor
    scale = image_processor.rescale_factor
    lines = [
        "aipp_mode: static",
        "related_input_rank: 0",
        "input_format: RGB888_U8",
        f"src_image_size_w: {side}",
        f"src_image_size_h: {side}",
    ]
    for channel, (mean, std) in enumerate(zip(image_processor.image_mean, image_processor.image_std, strict=True)):
        lines += [f"min_chn_{channel}: {mean / scale:.6f}", f"var_reci_chn_{channel}: {scale / std:.8f}"]
    path = folder / AIPP
    path.write_text("aipp_op {\n" + "".join(f"    {line}\n" for line in lines) + "}\n")
    return path


def om_path(path: Path) -> Path:
    """`path` with the ending of offline models, which atc adds, too. Raises UserError: it names no file."""
    if path.is_dir() or not path.name or path.name == "..":
        raise UserError(f"--output {path} is a folder: name the file, as {path / 'model.om'}")
    return path if path.suffix == f".{OM}" else path.with_name(f"{path.name}.{OM}")


def parse_shapes(text: str | None) -> dict[str, list[int]]:
    """ "name:1,3,224,224;other:1,77" as lists by name. Raises UserError."""
    shapes = {}
    for part in filter(None, (text or "").split(";")):
        name, colon, sizes = part.rpartition(":")
        if not colon or not name:
            raise UserError(f"--input-shape '{text}': as \"name:1,3,224,224;other:1,77\"")
        shapes[name] = _numbers("--input-shape", sizes)
    return shapes


def parse_profiles(text: str | None) -> list[list[int]]:
    """ "1,1;2,2" as lists. Raises UserError."""
    return [_numbers("--dynamic-dims", part) for part in filter(None, (text or "").split(";"))]


def _numbers(flag: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"{flag}: '{text}' has to be whole numbers with commas between them") from None
