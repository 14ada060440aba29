"""Whether a model's files held all its tensors: what they lack is random, or absent, and says so at most in a log."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import nn

from runners.cli import UserError

TELLING_PARTS = 4  # of a tensor's name, from its end: what stands before them differs between versions of transformers
MOST_NAMES = 5  # that a message lists


def check_loaded(models: Mapping[Path, nn.Module]) -> None:
    """Make sure that each model's parameters came from the .safetensors files in its folder, where there are some.

    Raises:
        UserError: some did not, with their names.
    """
    for folder, model in models.items():
        endings = {_ending(key) for file in folder.glob("*.safetensors") for key in _keys(file)}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        absent = [name for name, parameter in parameters.items() if parameter.is_meta]
        if endings and not absent:
            found = {id(p) for name, p in parameters.items() if _ending(name) in endings}  # tied ones are stored once
            absent = [name for name, parameter in parameters.items() if id(parameter) not in found]
        if absent:
            more = f" and {len(absent) - MOST_NAMES} more" if len(absent) > MOST_NAMES else ""
            raise UserError(
                f"the files in {folder} lack {', '.join(absent[:MOST_NAMES])}{more}: they are damaged, or of another "
                f"model than {type(model).__name__}"
            )


def _keys(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _ending(name: str) -> str:
    return ".".join(name.split(".")[-TELLING_PARTS:])
