"""The models of a pipeline without values: from the configurations alone, or as copies of those that there are."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ascend.streaming import Stream
from ascend.streaming.blocks import tensors_of

INDEX = "model_index.json"
LIBRARIES = ("diffusers", "transformers")
# Where modules have what stands around the forward of their class: hooks that move weights, graphs, shared batches.
AROUND = ("forward", "_old_forward", "_hf_hook")
LEFT_OUT = object()


def load_on_meta(folder: Path, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The models that `model_index.json` in `folder` names, without weights, by their names.

    Raises:
        FileNotFoundError: there is no index, or a component lacks its configuration.
        ValueError: the index is no JSON, or a component is of a class that neither diffusers nor transformers has.
    """
    index = _read_index(folder)
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


def class_of(folder: Path) -> str:
    """The name of the pipeline's class in `folder`. Raises as `load_on_meta`."""
    return str(_read_index(folder).get("_class_name"))


def longest_text(source: Path | Any) -> int:
    """Tokens of the longest text that any tokenizer of a folder or a pipeline takes; a large number if none says."""
    if isinstance(source, Path):
        files = sorted(source.glob("tokenizer*/tokenizer_config.json"))
        found = [json.loads(file.read_text(encoding="utf-8")).get("model_max_length") for file in files]
    else:
        found = [getattr(part, "model_max_length", None) for part in source.components.values()]
    return max((int(length) for length in found if length), default=sys.maxsize)


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / INDEX} is no JSON: {error}") from error
    if not isinstance(index, dict):
        raise ValueError(f"{folder / INDEX} must hold an object, not a {type(index).__name__}")
    return index


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
    cast_floats(model, dtype)
    return model.eval().requires_grad_(False)


def cast_floats(model: nn.Module, dtype: torch.dtype) -> None:
    """As `model.to(dtype)`, without what diffusers says of values that are lost."""
    for tensor in tensors_of(model):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def to_meta(model: nn.Module) -> nn.Module:
    """A copy without values, and without what moves, compiles or shares it; itself if it has no values."""
    if all(parameter.is_meta for parameter in model.parameters()):
        return model
    memo: dict[int, Any] = {}
    for tensor in tensors_of(model):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    for module in model.modules():
        memo |= {id(vars(module)[name]): LEFT_OUT for name in AROUND if name in vars(module)}
        memo |= {id(hook): LEFT_OUT for hook in hooks_of_stream(module)}
    bare = copy.deepcopy(model, memo)
    for module in bare.modules():
        for name in AROUND:
            vars(module).pop(name, None)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook is LEFT_OUT]:
                del hooks[key]
    return bare


def hooks_of_stream(module: nn.Module) -> list[Any]:
    """Those of its blocks, if `module` is streamed."""
    stream = vars(module).get("_hf_hook")
    handles: list[Any] = stream.handles if isinstance(stream, Stream) else []
    found = [(handle.hooks_dict_ref(), handle.id) for handle in handles if isinstance(handle, RemovableHandle)]
    return [hooks[key] for hooks, key in found if hooks]
