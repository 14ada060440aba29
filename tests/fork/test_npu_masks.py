"""Attention masks on NPU mean what they mean elsewhere: True attends, a float is added to the scores."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import _prepare_npu_attn_mask, dispatch_attention_fn
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, AttnProcessorNPU

MakeMask = Callable[[tuple[int, ...]], torch.Tensor]

BATCH, HEADS, QUERIES, KEYS, HEAD_DIM = 2, 3, 5, 7, 4
EVERY_BROADCAST: list[tuple[int, ...]] = list(itertools.product((1, BATCH), (1, HEADS), (1, QUERIES), (1, KEYS)))
FEWER_DIMENSIONS = [(QUERIES, KEYS), (1, KEYS), (BATCH, KEYS), (HEADS, QUERIES, KEYS), (HEADS, 1, KEYS)]


def random_mask(shape: tuple[int, ...]) -> torch.Tensor:
    """A boolean mask of `shape` in which each query, whatever the broadcast, attends to its first key at least."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    mask[..., 0] = True
    return mask


def random_bias(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def random_qkv() -> list[torch.Tensor]:
    """Query, key and value `[batch, tokens, heads, head_dim]`."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(BATCH, tokens, HEADS, HEAD_DIM, generator=generator) for tokens in (QUERIES, KEYS, KEYS)]


def masked_out(shape: tuple[int, ...]) -> torch.Tensor:
    return _prepare_npu_attn_mask(random_mask(shape), BATCH, HEADS, QUERIES, KEYS)


@pytest.mark.parametrize("shape", EVERY_BROADCAST + FEWER_DIMENSIONS, ids=str)
def test_kernel_masks_give_the_same_attention_as_scaled_dot_product_attention(shape: tuple[int, ...]) -> None:
    query, key, value = (x.transpose(1, 2) for x in random_qkv())
    scores = query @ key.mT / math.sqrt(HEAD_DIM)
    kernel = torch.softmax(scores.masked_fill(masked_out(shape), -math.inf), dim=-1) @ value

    mask = random_mask(shape)
    per_token = mask[:, None, None, :] if shape == (BATCH, KEYS) else mask
    torch.testing.assert_close(kernel, F.scaled_dot_product_attention(query, key, value, attn_mask=per_token))


@pytest.mark.parametrize("shape", EVERY_BROADCAST + FEWER_DIMENSIONS, ids=str)
def test_kernel_masks_have_a_shape_that_the_kernel_takes(shape: tuple[int, ...]) -> None:
    assert masked_out(shape).shape[:2] in [(1, 1), (BATCH, 1), (BATCH, HEADS)]
    assert masked_out(shape).shape[2:] == (QUERIES, KEYS)
    assert masked_out(shape).is_contiguous()


def test_kernel_masks_are_not_expanded_over_heads_without_need() -> None:
    assert masked_out((QUERIES, KEYS)).shape == (1, 1, QUERIES, KEYS)
    assert masked_out((BATCH, KEYS)).shape == (BATCH, 1, QUERIES, KEYS)
    assert masked_out((BATCH, 1, 1, KEYS)).shape == (BATCH, 1, QUERIES, KEYS)


def test_a_mask_that_does_not_broadcast_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="must match"):
        masked_out((BATCH, 1, QUERIES, KEYS + 1))


@pytest.mark.parametrize("make", [random_mask, random_bias])
@pytest.mark.parametrize("shape", EVERY_BROADCAST + FEWER_DIMENSIONS, ids=str)
def test_native_npu_equals_native_on_the_cpu(make: MakeMask, shape: tuple[int, ...]) -> None:
    query, key, value = random_qkv()
    native, npu = (
        dispatch_attention_fn(query, key, value, attn_mask=make(shape), scale=0.3, backend=backend)
        for backend in ("native", "_native_npu")
    )
    assert torch.equal(npu, native)


def test_native_npu_is_causal_when_it_is_asked_to_be() -> None:
    query, key, value = random_qkv()
    native, npu = (
        dispatch_attention_fn(query, key, value, is_causal=True, backend=backend)
        for backend in ("native", "_native_npu")
    )
    assert torch.equal(npu, native)
    assert not torch.equal(npu, dispatch_attention_fn(query, key, value, backend="native"))


def test_native_npu_takes_grouped_queries() -> None:
    query, key, value = random_qkv()
    native, npu = (
        dispatch_attention_fn(query, key[:, :, :1], value[:, :, :1], enable_gqa=True, backend=backend)
        for backend in ("native", "_native_npu")
    )
    assert torch.equal(npu, native)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("make", [random_mask, random_bias, None])
def test_attn_processor_npu_equals_attn_processor_2_0_on_the_cpu(make: MakeMask | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    attention = Attention(query_dim=8, cross_attention_dim=6, heads=HEADS, dim_head=HEAD_DIM).to(dtype)
    hidden_states = torch.randn(BATCH, QUERIES, 8, dtype=dtype)
    text = torch.randn(BATCH, KEYS, 6, dtype=dtype)
    mask = make((BATCH, 1, KEYS)) if make else None
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype)

    # The constructor asks for torch_npu, which no CPU tensor needs.
    npu = AttnProcessorNPU.__new__(AttnProcessorNPU)
    expected = AttnProcessor2_0()(attention, hidden_states, text, mask)
    assert torch.equal(npu(attention, hidden_states, text, mask), expected)
