"""Whether ranks that share a picture were given the same: a few numbers of each argument, to be gathered and compared.

A digest of the bytes would be exact and too strict: encoders may sum in another order on each device. Other noise, or
another prompt, differs everywhere, and so in the numbers picked here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

PICKED = 256  # numbers of a tensor, evenly from all of it
MOST_DIMENSIONS = 6
TOLERANCE = 0.05  # of the largest; bfloat16 and sums of another order stay far below
PARTS = ("latents", "prompts", "conditions", "timesteps")


def fingerprint(
    latents: torch.Tensor, timestep: torch.Tensor | float, prompt: Any, condition: Any = None
) -> torch.Tensor:
    """The numbers to compare, as one float32 vector of always the same length on the device of `latents`.

    Args:
        latents: [batch, channels, height, width].
        timestep: of all samples or of each.
        prompt: [batch, tokens, width], or any structure of tensors, the first of which stands for all.
        condition: a ControlNet's picture, or any structure of such.
    """
    parts = [latents]
    for structure in (prompt, condition):
        tensors = [leaf for leaf in pytree.tree_leaves(structure) if isinstance(leaf, torch.Tensor)]
        parts.append(tensors[0].to(latents.device) if tensors else latents.new_zeros(0))
    parts.append(torch.as_tensor(timestep, dtype=torch.float32, device=latents.device))
    return torch.cat([_pick(part) for part in parts])


def _pick(tensor: torch.Tensor) -> torch.Tensor:
    """The shape and `PICKED` of the numbers, both filled up with zeros."""
    flat = tensor.detach().flatten().float()
    picked = flat[:: max(1, -(-len(flat) // PICKED))]
    shape = torch.tensor([*tensor.shape, *[0] * (MOST_DIMENSIONS - tensor.dim())], device=tensor.device)
    return torch.cat([shape.float(), picked, picked.new_zeros(PICKED - len(picked))])


def differences(expected: torch.Tensor, actual: torch.Tensor) -> list[str]:
    """The names of what two fingerprints, on the CPU, say is not the same."""
    numbers = (fingerprint.nan_to_num().chunk(len(PARTS)) for fingerprint in (expected, actual))
    parts = zip(PARTS, *numbers, strict=True)
    return [name for name, mine, theirs in parts if not _is_same(name, mine, theirs)]


def _is_same(name: str, expected: torch.Tensor, actual: torch.Tensor) -> bool:
    if name == "timesteps" or not torch.equal(expected[:MOST_DIMENSIONS], actual[:MOST_DIMENSIONS]):
        return torch.equal(expected, actual)
    largest = expected[MOST_DIMENSIONS:].abs().max()
    return bool(((expected - actual).abs() <= TOLERANCE * largest).all())
