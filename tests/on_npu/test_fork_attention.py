"""The fork's `_native_npu` backend and AttnProcessorNPU on the chip: masks and causality."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import _has_npu_fusion_attention, dispatch_attention_fn
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, AttnProcessorNPU

BATCH, HEADS, QUERIES, KEYS, HEAD_DIM = 2, 3, 48, 64, 16
TOLERANCE = 2e-3  # float16 inputs and results, and probabilities that a kernel may round to float16


def random_qkv(keys: int = KEYS) -> list[torch.Tensor]:
    """Query, key and value [batch, tokens, heads, head_dim] in float16 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, tokens, HEADS, HEAD_DIM) for tokens in (QUERIES, keys, keys)]
    return [torch.randn(shape, generator=generator).half() for shape in shapes]


def expected(qkv: list[torch.Tensor], **options: Any) -> torch.Tensor:
    query, key, value = (x.float().transpose(1, 2) for x in qkv)
    return F.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)


def on_npu(qkv: list[torch.Tensor], npu: torch.device, **options: Any) -> torch.Tensor:
    query, key, value = (x.to(npu) for x in qkv)
    return dispatch_attention_fn(query, key, value, backend="_native_npu", **options)


def assert_close(actual: torch.Tensor, reference: torch.Tensor) -> None:
    assert actual.device.type == "npu"
    torch.testing.assert_close(actual.float().cpu(), reference, rtol=TOLERANCE, atol=TOLERANCE)


def test_the_fused_kernel_is_used_where_op_plugin_documents_it(npu: torch.device, chip: str) -> None:
    assert _has_npu_fusion_attention() == chip.startswith("Ascend910B")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("keys", [KEYS, QUERIES])
def test_attention_is_causal_when_it_is_asked_to_be(npu: torch.device, is_causal: bool, keys: int) -> None:
    qkv = random_qkv(keys)
    assert_close(on_npu(qkv, npu, is_causal=is_causal), expected(qkv, is_causal=is_causal))


@pytest.mark.parametrize("shape", [(BATCH, KEYS), (1, 1, QUERIES, KEYS), (BATCH, HEADS, QUERIES, KEYS)])
def test_a_boolean_mask_keeps_what_is_true(npu: torch.device, shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[..., 0] = True
    qkv = random_qkv()
    whole = mask[:, None, None, :] if mask.dim() == 2 else mask
    assert_close(on_npu(qkv, npu, attn_mask=mask.to(npu)), expected(qkv, attn_mask=whole))


def test_a_float_mask_is_a_bias(npu: torch.device) -> None:
    bias = torch.randn(1, 1, QUERIES, KEYS, generator=torch.Generator().manual_seed(1)).half()
    qkv = random_qkv()
    assert_close(on_npu(qkv, npu, attn_mask=bias.to(npu)), expected(qkv, attn_mask=bias.float()))


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_kernel_that_is_chosen_has_a_derivative(npu: torch.device, is_causal: bool) -> None:
    leaves = [x.to(npu).requires_grad_() for x in random_qkv()]
    assert on_npu(
        leaves, npu, is_causal=is_causal
    ).requires_grad  # the emulator lacks the backward operators themselves


@pytest.mark.parametrize("is_masked", [False, True])
def test_attn_processor_npu_equals_attn_processor_2_0(npu: torch.device, is_masked: bool) -> None:
    torch.manual_seed(0)
    attention = Attention(query_dim=32, cross_attention_dim=24, heads=HEADS, dim_head=HEAD_DIM).half()
    hidden_states, text = torch.randn(BATCH, QUERIES, 32).half(), torch.randn(BATCH, KEYS, 24).half()
    mask = torch.rand(BATCH, 1, KEYS) > 0.5 if is_masked else None
    with torch.no_grad():
        reference = AttnProcessor2_0()(
            attention.float(), hidden_states.float(), text.float(), mask if mask is None else mask.clone()
        )
        attention = attention.half().to(npu)
        actual = AttnProcessorNPU()(
            attention, hidden_states.to(npu), text.to(npu), mask if mask is None else mask.to(npu)
        )
    assert_close(actual, reference)
