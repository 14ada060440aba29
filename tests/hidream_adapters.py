"""LoRA adapters of a tiny HiDream, in files of the forms that there are."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import HiDreamImageTransformer2DModel
from peft import LoraConfig
from safetensors.torch import save_file

# What HiDream-E1's inference.py names.
TARGETS = ["to_q", "to_k", "to_v", "to_out", "to_q_t", "to_k_t", "to_v_t", "to_out_t", "w1", "w2", "w3"]
ATTENTION = "single_stream_blocks.1.block.attn1"
FULL = (
    "x_embedder.proj.weight",
    "x_embedder.proj.bias",
    f"{ATTENTION}.q_rms_norm.weight",
    "double_stream_blocks.0.block.ff_i.gate.weight",
)


def add_adapter(
    model: HiDreamImageTransformer2DModel, name: str = "default", seed: int = 0, alpha: int = 4
) -> HiDreamImageTransformer2DModel:
    """A random one of rank 4, by peft itself; without gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        targets = [*TARGETS, "final_layer.linear"]
        model.add_adapter(LoraConfig(r=4, lora_alpha=alpha, target_modules=targets, init_lora_weights=False), name)
    return model.requires_grad_(False)


def low_rank_of(model: HiDreamImageTransformer2DModel) -> dict[str, torch.Tensor]:
    """Of the adapters of `model`, by their names in it."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if ".lora_" in name}


def full_of(model: HiDreamImageTransformer2DModel, seed: int = 9) -> dict[str, torch.Tensor]:
    """Other values for some whole weights of a model without adapters."""
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    return {name: torch.randn(state[name].shape, generator=generator) for name in FULL}


def save_original(path: Path, model: HiDreamImageTransformer2DModel, full: dict[str, torch.Tensor]) -> Path:
    """As HiDream-E1-Full.safetensors: names of a model with the adapter "default", and whole weights."""
    save_file(low_rank_of(model) | full, path)
    return path
