"""What is brought to the device at once."""

from __future__ import annotations

import torch
from torch import nn

ALIGNMENT = 512  # bytes: what the allocators of CUDA and torch_npu, and CANN's operators, align tensors to


def find_blocks(module: nn.Module, largest: int | None = None) -> dict[str, nn.Module]:
    """The parts of `module` that repeat, by their names in it, in the order of their definition.

    That are the entries of its lists of modules, such as a transformer's blocks. One of more than `largest` bytes that
    has lists itself is taken apart into their entries. What is in no list belongs to no block.
    """
    blocks: dict[str, nn.Module] = {}
    _collect(module, "", largest, blocks)
    return blocks


def _collect(module: nn.Module, prefix: str, largest: int | None, blocks: dict[str, nn.Module]) -> None:
    for name, child in module.named_children():
        if not isinstance(child, nn.ModuleList):
            _collect(child, f"{prefix}{name}.", largest, blocks)
            continue
        for number, entry in child.named_children():  # not its items, as diffusers keeps None among attentions
            path = f"{prefix}{name}.{number}"
            if largest is not None and bytes_of(entry) > largest and _has_lists(entry):
                _collect(entry, f"{path}.", largest, blocks)
            elif bytes_of(entry):
                blocks[path] = entry


def _has_lists(module: nn.Module) -> bool:
    return any(isinstance(child, nn.ModuleList) for child in module.modules())


def bytes_of(module: nn.Module) -> int:
    """Of its parameters and buffers on a device, each aligned there; one that stands in two places counts once."""
    return sum(aligned(tensor.nbytes) for tensor in tensors_of(module))


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers, each once."""
    return list({id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}.values())


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
