"""LoRA adapters in files."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from torch import nn

from runners.cli import UserError, is_out_of_memory
from runners.weight_files import check_weights, first_line

MOST_KEYS = 5  # that a message names


class Lora(NamedTuple):
    path: Path
    scale: float


def check_loras(loras: Sequence[Lora], option: str = "--lora") -> None:
    """Raise UserError unless each is a whole .safetensors file; `option` gave them."""
    for path, _ in loras:
        if path.suffix != ".safetensors" or not path.is_file():
            what = "must be a .safetensors file" if path.exists() else "does not exist"
            raise UserError(f"{option} {path} {what}")
        check_weights(path)


def fuse_loras(pipe: StableDiffusionPipeline, loras: Sequence[Lora]) -> None:
    """Add the adapters to the weights of `pipe`, so that steps and graphs are those of a model without any.

    Raises:
        UserError: a file is no adapter, or a tensor of it has no place in this model; the message names those.
    """
    for number, (path, scale) in enumerate(loras):
        try:
            state: Any = pipe.lora_state_dict(path.parent, weight_name=path.name)[0]
            require_places(pipe, state)
            if scale == 0:
                continue
            pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=f"lora_{number}")
        except Exception as error:  # of any kind: the file is the user's
            if is_out_of_memory(error):
                raise
            raise UserError(f"--lora {path} does not fit this model: {first_line(error)}") from error
    names = {f"lora_{number}": lora.scale for number, lora in enumerate(loras) if lora.scale}
    if names:
        pipe.set_adapters(list(names), list(names.values()))
        pipe.fuse_lora(adapter_names=list(names))
        pipe.unload_lora_weights()


def require_places(pipe: StableDiffusionPipeline, state: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError unless each tensor of an adapter has a layer in `pipe`, and its shape there.

    diffusers leaves out what it finds no layer for, with a line in the log at most.

    Args:
        state: as `lora_state_dict` returns it.
    """
    strangers = [key for key in state if not key.startswith(("unet.", "text_encoder."))]
    for component, convert in (
        ("unet", convert_unet_state_dict_to_peft),
        ("text_encoder", convert_state_dict_to_peft),
    ):
        own = {
            key.removeprefix(f"{component}."): value for key, value in state.items() if key.startswith(f"{component}.")
        }
        if own:
            layers = dict(getattr(pipe, component).named_modules())
            own = own if is_peft(own) else convert(own)
            strangers += [f"{component}.{key}" for key in _without_place(layers, own)]
    if strangers or not state:
        known = len(state) - len(strangers)
        raise ValueError(
            f"none of its weights is of a layer here: {_named(strangers)}"
            if known <= 0
            else f"there is no place of their shape for {_named(strangers)}, only for {known} others"
        )


def is_peft(state: Mapping[str, torch.Tensor]) -> bool:
    return any(".lora_A." in key for key in state)


def _without_place(layers: Mapping[str, nn.Module], state: Mapping[str, torch.Tensor]) -> Iterator[str]:
    for key, tensor in state.items():
        name, _, matrix = key.partition(".lora_")
        shape = getattr(getattr(layers.get(name), "weight", None), "shape", None)
        if (
            shape is None
            or (matrix[:1] == "A" and tensor.shape[1] != shape[1])
            or (matrix[:1] == "B" and tensor.shape[0] != shape[0])
        ):
            yield key


def _named(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - MOST_KEYS} more" if len(keys) > MOST_KEYS else ""
    return ", ".join(keys[:MOST_KEYS]) + more
