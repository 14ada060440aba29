"""LoRA files for HiDream's transformer: those of diffusers and peft, and E1-Full's, which has whole weights, too.

diffusers itself refuses E1-Full's file, and of a file whose names it does not know it loads nothing, or a part, and
says so at most in the log. Here every tensor of a file finds its place, or nothing is loaded.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import nn

from processors.models.full_weights import FullWeights

# What stands before a layer's name: in files of peft, of diffusers and of ComfyUI.
PREFIXES = re.compile(r"^(?:base_model\.model\.)?(?:transformer\.|diffusion_model\.)?")
LOW_RANK = re.compile(r"(.+)\.(?:lora_([AB])|lora[_.](down|up))(?:\.[^.]+)?\.weight")
ALPHA = re.compile(r"(.+)\.alpha")
OF_ADAPTER = ".lora_full"  # stands in names of whole weights that `save_lora_adapter` wrote
METADATA = "lora_adapter_metadata"  # of diffusers, in a file's header
CONFIG = "adapter_config.json"  # of peft, beside its ADAPTER
ADAPTER = "adapter_model.safetensors"
MOST_KEYS = 5  # that a message names


@dataclass
class AdapterFile:
    """What a file holds, by the names of layers and parameters in the model.

    Attributes:
        low_rank: of each layer `a`, `[rank, in]`, and `b`, `[out, rank]`.
        alphas: of each layer: the product `b @ a` counts alpha / rank.
        full: whole parameters.
    """

    low_rank: dict[str, dict[str, torch.Tensor]] = field(default_factory=lambda: defaultdict(dict))
    alphas: dict[str, float] = field(default_factory=dict)
    full: dict[str, torch.Tensor] = field(default_factory=dict)


def load_adapter(pipe: Any, path: Path | str, name: str) -> None:
    """Load a LoRA file into the transformer of `pipe`, under `name` and in effect.

    diffusers' own functions then switch, weigh and remove it (`set_adapters`, `disable_lora`, `delete_adapters`,
    `unload_lora_weights`, `attention_kwargs={"scale": ...}`), whole weights among it. `enable_fused_kernels` may come
    before or after.

    Args:
        pipe: a pipeline with a `HiDreamImageTransformer2DModel`.
        path: of a .safetensors file.
        name: of the adapter, without dots; there is none of that name yet.

    Raises:
        ValueError: tensors of the file have no place in the model, or another shape there, or there is an adapter of
            that name. The message names them, and nothing has changed.
    """
    transformer = pipe.transformer
    if name in getattr(transformer, "peft_config", {}):
        raise ValueError(f"there is an adapter '{name}' already: delete it, or take another name")
    if not name or "." in name:
        raise ValueError(f"an adapter's name is part of its parameters' names: it has no dots, and '{name}' is none")
    file = read_adapter(Path(path))
    check_fits(file, transformer)
    transformer.load_lora_adapter(
        {
            f"{layer}.lora_{side}.weight": tensor
            for layer, pair in file.low_rank.items()
            for side, tensor in pair.items()
        },
        prefix=None,
        adapter_name=name,
        metadata=_config_of(file),
        low_cpu_mem_usage=True,
        _pipeline=pipe,
    )
    by_owner: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in file.full.items():
        owner, _, parameter = key.rpartition(".")
        by_owner[owner][parameter] = tensor
    for owner, weights in by_owner.items():
        _full_weights_at(transformer, owner).add(name, weights)
    transformer.set_adapter(name)


def read_adapter(path: Path) -> AdapterFile:
    """The content of a file, of whatever program.

    Raises:
        ValueError: no tensor is one of a low-rank adapter, or one has no counterpart.
    """
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no dict
        metadata = json.loads((file.metadata() or {}).get(METADATA, "null"))
    found = AdapterFile()
    for key, tensor in tensors.items():
        short = PREFIXES.sub("", key)
        if match := LOW_RANK.fullmatch(short):
            side = match[2] or {"down": "A", "up": "B"}[match[3]]
            if side in found.low_rank[match[1]]:
                raise ValueError(f"{path} holds several adapters: {key} is there twice, for different ones")
            found.low_rank[match[1]][side] = tensor
        elif match := ALPHA.fullmatch(short):
            found.alphas[match[1]] = tensor.item()
        else:
            found.full[short.replace(OF_ADAPTER, "")] = tensor
    if not found.low_rank:
        raise ValueError(f"{path} is no LoRA file: no name is as ...lora_A.weight, but there is {_named(tensors)}")
    alone = [layer for layer, pair in found.low_rank.items() if len(pair) < 2]
    if alone:
        raise ValueError(f"{path} has one of two matrices only, lora_A or lora_B, for {_named(alone)}")
    idle = [f"{layer}.alpha" for layer in found.alphas if layer not in found.low_rank]
    if idle:
        raise ValueError(f"{path} has no matrices for {_named(idle)}")
    config = metadata or _peft_config(path)
    if config:
        found.alphas = _alphas_of(config, found) | found.alphas
    return found


def check_fits(file: AdapterFile, model: nn.Module) -> None:
    """Raise ValueError unless each tensor has its place in `model`, and its shape there."""
    layers = {_bare(name): layer for name, layer in model.named_modules() if not isinstance(layer, BaseTunerLayer)}
    absent = [layer for layer in file.low_rank if not isinstance(layers.get(layer), nn.Linear)]
    absent += [key for key in file.full if _parameter(layers, key) is None]
    if absent:
        known = len({*file.low_rank, *file.full} - set(absent))
        raise ValueError(
            f"the model has no place for {_named(absent)}; it has one for {known} others, and none was loaded"
        )
    wrong = []
    for name, pair in file.low_rank.items():
        layer, a, b = layers[name], pair["A"], pair["B"]
        wanted = (layer.out_features, layer.in_features)
        if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1] or (len(b), a.shape[1]) != wanted:
            wrong.append(f"{name} ({tuple(b.shape)} @ {tuple(a.shape)} for {wanted})")
    for key, tensor in file.full.items():
        parameter = _parameter(layers, key)
        if parameter is not None and parameter.shape != tensor.shape:
            wrong.append(f"{key} ({tuple(tensor.shape)} for {tuple(parameter.shape)})")
    if wrong:
        raise ValueError(f"it is of a model of another size: {_named(wrong)}")


def _parameter(layers: dict[str, nn.Module], key: str) -> torch.Tensor | None:
    """That of a layer which is called as a module, as an expert is not, and has no integers in the weight's place."""
    owner, _, name = key.rpartition(".")
    if owner not in layers or ".experts." in f".{owner}.":
        return None
    parameters = layers[owner]._parameters
    is_quantized = any(each is not None and not each.is_floating_point() for each in parameters.values())
    return None if is_quantized else parameters.get(name)


def _bare(name: str) -> str:
    """Without what peft puts in."""
    return name.replace(".base_layer", "")


def _full_weights_at(model: nn.Module, owner: str) -> FullWeights:
    """The layer around that at `owner`, below low-rank adapters on it; made where there is none."""
    parent_name, _, child = owner.rpartition(".")
    holder: Any = model.get_submodule(parent_name)
    while True:
        layer = getattr(holder, child)
        if isinstance(layer, FullWeights):
            return layer
        if not isinstance(layer, BaseTunerLayer):
            break
        holder, child = layer, "base_layer"
    layer = FullWeights(layer).train(layer.training)
    setattr(holder, child, layer)
    return layer


def _config_of(file: AdapterFile) -> dict[str, Any]:
    """Of peft: the usual rank and alpha, and the layers with others."""
    ranks = {layer: len(pair["A"]) for layer, pair in file.low_rank.items()}
    alphas = {layer: file.alphas.get(layer, rank) for layer, rank in ranks.items()}
    config: dict[str, Any] = {"target_modules": list(ranks)}
    for usual, pattern, values in (("r", "rank_pattern", ranks), ("lora_alpha", "alpha_pattern", alphas)):
        ((most, _),) = Counter(values.values()).most_common(1)
        others = {f"^{re.escape(layer)}": value for layer, value in values.items() if value != most}
        config |= {usual: most, pattern: others}
    return config


def _peft_config(path: Path) -> dict[str, Any] | None:
    beside = path.with_name(CONFIG)
    return json.loads(beside.read_text(encoding="utf-8")) if path.name == ADAPTER and beside.is_file() else None


def _alphas_of(config: dict[str, Any], file: AdapterFile) -> dict[str, float]:
    """What peft would make of `config`."""
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    if config.get("use_dora"):
        raise ValueError("it is a DoRA adapter, and plain LoRA is what is computed here")
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    alphas = {}
    for layer, pair in file.low_rank.items():
        usual: float = config.get("lora_alpha", len(pair["A"]))
        alpha = patterns.get(get_pattern_key(list(patterns), layer), usual)
        # peft's rank-stabilised LoRA counts alpha / sqrt(rank).
        alphas[layer] = alpha * math.sqrt(len(pair["A"])) if config.get("use_rslora") else alpha
    return alphas


def _named(keys: Collection[str]) -> str:
    first = ", ".join(list(keys)[:MOST_KEYS])
    return f"{first} and {len(keys) - MOST_KEYS} more" if len(keys) > MOST_KEYS else first
