"""Loading a pipeline from a folder, with errors that name the file at fault."""

import json
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open

from examples.common.cli import UserError

Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)

# What a component's folder must hold beside weights, by a part of its class's name; any one of the names will do.
CONFIG_FILES = {
    "Scheduler": ("scheduler_config.json",),
    "Tokenizer": ("tokenizer.json", "vocab.json"),
    "Processor": ("preprocessor_config.json",),
    "FeatureExtractor": ("preprocessor_config.json",),
}
MODEL_CONFIG = ("config.json",)


def require_patched_diffusers() -> None:
    """Raise UserError on a diffusers that knows nothing of block inputs and feature caches."""
    if "+npu" not in diffusers.__version__:
        raise UserError(f"diffusers {diffusers.__version__} lacks this project's patches; run: bash apply_patch.sh")


def load_pipeline(pipeline_class: type[Pipeline], folder: Path, dtype: torch.dtype) -> Pipeline:
    """The pipeline saved in `folder` (diffusers' layout), in evaluation mode, on the CPU, its weights cast to `dtype`.

    Weights are mapped from file one model at a time, so the peak is the size of the pipeline and not twice that.
    Raises UserError when a file is missing or damaged.
    """
    variant = check_model_dir(folder)
    try:
        return pipeline_class.from_pretrained(folder, dtype=dtype, variant=variant, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the model in {folder}: {error}") from error


def check_model_dir(folder: Path) -> str | None:
    """Make sure that every component named in model_index.json is there and whole.

    Returns "fp16" when that variant of the weights is the only one there, None for the plain ones.
    """
    if not folder.is_dir():
        raise UserError(f"model directory {folder} does not exist")
    index = read_json(folder / "model_index.json")
    variants: set[str | None] = set()
    for name, kind in index.items():
        if isinstance(kind, list) and kind[0] is not None:
            variants |= check_component(folder / name, class_name=kind[1])
    return None if None in variants or not variants else "fp16"


def check_component(folder: Path, class_name: str) -> set[str | None]:
    """Check one component; the result is the variants of its weights, empty for a component without weights."""
    config_names = next((names for part, names in CONFIG_FILES.items() if part in class_name), MODEL_CONFIG)
    config = next((folder / name for name in config_names if (folder / name).exists()), folder / config_names[0])
    read_json(config)
    if config_names is not MODEL_CONFIG:
        return set()
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    if not weights:
        raise UserError(f"the model lacks its weights {folder}/*.safetensors")
    for index in folder.glob("*.index.json"):
        for shard in sorted(set(read_json(index)["weight_map"].values())):
            if not (folder / shard).exists():
                raise UserError(f"the model lacks {folder / shard}, which {index.name} lists")
    for path in weights:
        check_safetensors(path)
    return {"fp16" if ".fp16" in path.name else None for path in weights}


def check_safetensors(path: Path) -> None:
    """Read the header only, which tells whether the file is as long as it should be."""
    if path.suffix != ".safetensors":
        return
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise UserError(f"weights {path} are damaged ({error}); copy them again") from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"the model lacks {path}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
