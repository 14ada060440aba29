"""A model that is one file, a checkpoint in the layout of Stable Diffusion's authors.

It holds weights alone. Its configurations and the tokenizer are in a folder in diffusers' layout, which the user names
or which comes from the hub, where diffusers knows one for each kind of checkpoint.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import safe_open

from runners.cli import UserError
from runners.model_dir import Model, check_configs, check_model_dir
from runners.weight_files import check_weights, first_line

UNET = "model.diffusion_model."
SUFFIXES = (".safetensors", ".ckpt")
CONFIGS = ("*.json", "*/*.json", "*/*.txt")  # as diffusers' from_single_file fetches them


def check_model(path: Path, config: Path | None = None) -> Model:
    """Of a folder in diffusers' layout, or of a checkpoint with its configurations in the folder `config`.

    Raises:
        UserError: as `check_model_dir`; `config` has no effect, or it is needed.
    """
    if not (path.is_file() and path.suffix in SUFFIXES):
        if config:
            raise UserError(f"--config {config} has no effect: --model_path {path} is no {' or '.join(SUFFIXES)} file")
        return check_model_dir(path)
    check_weights(path)
    model, _ = check_configs(config or fetch_configs(path))
    return replace(model, checkpoint=path, files=(*model.files, path))


def fetch_configs(checkpoint: Path) -> Path:
    """The folder of the configurations for this kind of checkpoint, from the hub or its cache."""
    shapes = shapes_in(checkpoint)
    if not any(name.startswith(UNET) for name in shapes):
        raise UserError(f"{checkpoint} is no checkpoint of Stable Diffusion: none of its weights begins with {UNET}")
    repository = fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]
    try:
        return Path(snapshot_download(repository, allow_patterns=list(CONFIGS)))
    except (OSError, HfHubHTTPError) as error:
        raise UserError(
            f"{checkpoint} has weights alone, and the configurations of {repository} cannot be had from the hub "
            f"({first_line(error)}): give a folder that has them by --config"
        ) from error


def shapes_in(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by name, without their values."""
    if checkpoint.suffix == ".safetensors":
        with safe_open(checkpoint, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    content = torch.load(checkpoint, weights_only=True, map_location="meta", mmap=True)
    if not isinstance(content, dict):
        raise UserError(f"{checkpoint} holds no weights by name, but a {type(content).__name__}")
    return content.get("state_dict", content)
