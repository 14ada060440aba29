"""The models of a pipeline without values: from the configurations alone, or as copies of those that there are."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ascend.streaming.blocks import tensors_of

INDEX = "model_index.json"
LIBRARIES = ("diffusers", "transformers")


def load_on_meta(folder: Path, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The models that `model_index.json` in `folder` names, without weights, by their names.

    Raises:
        FileNotFoundError: there is no index, or a component lacks its configuration.
        ValueError: the index is no JSON, or a component is of a class that neither diffusers nor transformers has.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / INDEX} is no JSON: {error}") from error
    if not isinstance(index, dict):
        raise ValueError(f"{folder / INDEX} must hold an object, not a {type(index).__name__}")
    models = {}
    for name, entry in index.items():
        if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)):
            continue  # of no component, or one that is left out
        library = _library(entry[0])
        if library is None:
            continue
        kind = getattr(library, entry[1], None)
        if kind is None:
            raise ValueError(f"{folder / INDEX}: {entry[0]} has no {entry[1]}, which is the {name}")
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            try:
                models[name] = _make(kind, folder / name, dtype)
            except OSError:
                raise
            except Exception as error:  # of any kind: the configuration is the user's
                raise ValueError(f"{folder / name} has no configuration of a {entry[1]}: {error}") from error
    if not models:
        raise ValueError(f"{folder / INDEX} names no model")
    return models


def _library(name: str) -> Any:
    """diffusers, transformers, or diffusers' folder of a pipeline, as of the safety checker. None: another."""
    if name in LIBRARIES:
        return importlib.import_module(name)
    if importlib.util.find_spec(f"diffusers.pipelines.{name}") is None:
        return None
    return importlib.import_module(f"diffusers.pipelines.{name}")


def _make(kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        if hasattr(kind, "config_class"):  # transformers
            model = kind(kind.config_class.from_pretrained(folder))
        else:
            model = kind.from_config(kind.load_config(folder))
    for tensor in tensors_of(model):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model.eval().requires_grad_(False)


def to_meta(model: nn.Module) -> nn.Module:
    """A copy without values, unless it has none."""
    if all(parameter.is_meta for parameter in model.parameters()):
        return model
    memo: dict[int, Any] = {}
    for tensor in tensors_of(model):
        bare = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(bare, False) if isinstance(tensor, nn.Parameter) else bare
    return copy.deepcopy(model, memo)
