"""Gradient checkpointing calls a block as it is called without: with the grid of its tokens too."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.checkpoint import checkpoint

from processors.merging.processor import AttnProcessor2_0Tome
from tests.tiny_models import CROSS_ATTENTION_DIM, tiny_unet


def users_function(module: torch.nn.Module, *args: Any) -> Any:
    assert isinstance(module, torch.nn.Module)
    return checkpoint(module, *args, use_reentrant=False)


def merging_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = tiny_unet().train()
    for block in unet.down_blocks[0].attentions:
        block.transformer_blocks[0].attn1.set_processor(AttnProcessor2_0Tome(ratio=0.5))
    return unet


def gradients(unet: UNet2DConditionModel, **options: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 12, generator=generator)
    text = torch.randn(2, 77, CROSS_ATTENTION_DIM, generator=generator)
    unet(sample, 500, text, **options).sample.square().mean().backward()
    return [p.grad for p in unet.parameters() if p.grad is not None]


@pytest.mark.parametrize("function", [None, users_function])
def test_token_merging_trains_with_gradient_checkpointing(function: Callable[..., Any] | None) -> None:
    expected = gradients(merging_unet())
    unet = merging_unet()
    unet.enable_gradient_checkpointing(function)
    for actual, gradient in zip(gradients(unet), expected, strict=True):
        assert torch.equal(actual, gradient)


def test_a_shallow_pass_trains_with_gradient_checkpointing() -> None:
    feature = torch.randn(2, 64, 8, 12, generator=torch.Generator().manual_seed(1))
    options = {"cache_branch": (0, 1), "cached_feature": feature[:, :32]}
    expected = gradients(merging_unet(), **options)
    unet = merging_unet()
    unet.enable_gradient_checkpointing()
    for actual, gradient in zip(gradients(unet, **options), expected, strict=True):
        assert torch.equal(actual, gradient)
