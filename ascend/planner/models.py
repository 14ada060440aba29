"""The models of a pipeline as they would be: their weights' sizes, blocks and calls, from the configurations alone."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ascend.streaming.blocks import tensors_of

INDEX = "model_index.json"


class Request(NamedTuple):
    """What is drawn: pixels, pictures at a time, and whether guidance doubles them."""

    height: int
    width: int
    batch: int = 1
    guidance: bool = True


class Call(NamedTuple):
    """One way in which a component runs: in each step or once a picture, with these arguments."""

    phase: str  # "encode", "denoise" or "decode"
    inputs: dict[str, Any]
    target: Callable[[nn.Module], nn.Module] = lambda module: module


def load_on_meta(folder: Path, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The models that `model_index.json` in `folder` names, without weights, by their names.

    Raises:
        FileNotFoundError: there is no index, or a component lacks its configuration.
        ValueError: a component is of a class that neither diffusers nor transformers has.
    """
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    models = {}
    for name, entry in index.items():
        if not (isinstance(entry, list) and len(entry) == 2 and entry[0] in ("diffusers", "transformers")):
            continue
        kind = getattr(importlib.import_module(entry[0]), entry[1], None)
        if kind is None:
            raise ValueError(f"{folder / INDEX}: {entry[0]} has no {entry[1]}, which is the {name}")
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            models[name] = _make(kind, folder / name, dtype)
    return models


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


def calls_of(models: dict[str, nn.Module], request: Request, dtype: torch.dtype) -> dict[str, Call]:
    """How each component runs in a picture. Those of classes that are not known here are left out."""
    calls = {}
    for name, model in models.items():
        make = CALLS.get(type(model).__name__)
        if make is not None:
            calls[name] = make(model, models, request, dtype)
    return calls


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _latents(models: dict[str, nn.Module], request: Request) -> tuple[int, int]:
    vae: Any = models["vae"]
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    return request.height // scale, request.width // scale


def _text(model: Any, models: dict[str, nn.Module], request: Request, dtype: torch.dtype) -> Call:
    length = min(getattr(model.config, "max_position_embeddings", 77), 77)
    return Call("encode", {"input_ids": _meta(1, length, dtype=torch.int64)})


def _unet(model: Any, models: dict[str, nn.Module], request: Request, dtype: torch.dtype) -> Call:
    rows = request.batch * (2 if request.guidance else 1)
    width = model.config.cross_attention_dim
    inputs: dict[str, Any] = {
        "sample": _meta(rows, model.config.in_channels, *_latents(models, request), dtype=dtype),
        "timestep": _meta(dtype=torch.int64),
        "encoder_hidden_states": _meta(rows, 77, width if isinstance(width, int) else width[0], dtype=dtype),
    }
    if model.config.addition_embed_type == "text_time":
        text = model.config.projection_class_embeddings_input_dim - 6 * model.config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": _meta(rows, text, dtype=dtype),
            "time_ids": _meta(rows, 6, dtype=dtype),
        }
    return Call("denoise", inputs)


def _vae(model: Any, models: dict[str, nn.Module], request: Request, dtype: torch.dtype) -> Call:
    latents = _meta(request.batch, model.config.latent_channels, *_latents(models, request), dtype=dtype)
    return Call("decode", {"sample": latents}, attrgetter("decoder"))


CALLS: dict[str, Callable[[Any, dict[str, nn.Module], Request, torch.dtype], Call]] = {
    "AutoencoderKL": _vae,
    "CLIPTextModel": _text,
    "CLIPTextModelWithProjection": _text,
    "UNet2DConditionModel": _unet,
}
