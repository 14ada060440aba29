"""Prompts that a worker has encoded, kept for the pictures that follow: most rows share their negative prompt."""

from __future__ import annotations

from contextlib import suppress

import torch
from diffusers import StableDiffusionPipeline

from ascend import Tier, TieredStore
from ascend.tiers import TierError

MIB = 2**20
ON_DEVICE, WITH_HOST = 4 * MIB, 512 * MIB  # dozens of prompts of SD2.1, too little to plan for, and thousands


class EncodedPrompts:
    """Embeddings by their prompt, those in use on the device and the others in host memory.

    For a pipeline whose text encoder changes by its `adapters` alone. What does not fit is encoded again.

    Attributes:
        adapters: what those in use are called.
    """

    def __init__(self, pipe: StableDiffusionPipeline) -> None:
        self.pipe, self.adapters = pipe, ""
        device: torch.device = pipe._execution_device
        host = [Tier("cpu", WITH_HOST, pinned=device.type != "cpu")]
        self.store = TieredStore(host if device.type == "cpu" else [Tier(device, ON_DEVICE), *host])

    def encode(self, prompt: str) -> torch.Tensor:
        """`[1, tokens, channels]`, what the pipeline itself makes of `prompt`."""
        key = f"{self.adapters}\n{prompt}"
        with suppress(KeyError):
            return self.store.get(key)
        embeds: torch.Tensor
        with torch.no_grad():
            embeds, _ = self.pipe.encode_prompt(prompt, self.pipe._execution_device, 1, False)
        with suppress(TierError):  # it is full
            self.store.put(key, embeds)
        return embeds
