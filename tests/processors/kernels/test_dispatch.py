"""Our attention in models that attend through diffusers' dispatcher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, ModelMixin, SD3Transformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn

from processors import AttentionCall, disable_fused_kernels, enable_fused_kernels
from processors.kernels.dispatch import dispatched_attention
from processors.kernels.select import select_kernel
from tests.tiny_transformers import TRANSFORMERS, call, make_transformer


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[AttentionCall]:
    """The calls of our attention."""
    seen: list[AttentionCall] = []
    monkeypatch.setattr(
        "processors.kernels.attention.select_kernel", lambda call: seen.append(call) or select_kernel(call)
    )
    return seen


@torch.no_grad()
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_a_transformer_computes_the_same_by_our_attention(kind: type[ModelMixin], calls: list[AttentionCall]) -> None:
    model = make_transformer(kind)
    plain = call(model)
    assert not calls
    report = enable_fused_kernels(model, kernels=["sdpa"])
    assert torch.equal(call(model), plain)
    assert report == {kind.__name__: f"{len(calls)} attentions"} and calls[0].kernels == (
        "scaled_dot_product_attention",
    )
    disable_fused_kernels(model)
    calls.clear()
    assert torch.equal(call(model), plain) and not calls


@torch.no_grad()
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_diffusers_own_switch_takes_over_and_gives_back(kind: type[ModelMixin], calls: list[AttentionCall]) -> None:
    model = make_transformer(kind)
    enable_fused_kernels(model)
    model.set_attention_backend("_native_math")
    call(model)
    assert not calls
    with pytest.raises(ValueError, match="no attention of .* has diffusers' AttnProcessor2_0"):
        enable_fused_kernels(model)  # what the user chose stays, and is said
    model.reset_attention_backend()
    enable_fused_kernels(model)
    call(model)
    assert calls


def test_what_the_kernels_do_not_offer_is_refused() -> None:
    query = torch.randn(1, 4, 2, 8)
    for argument in ({"dropout_p": 0.5}, {"return_lse": True}, {"_parallel_config": object()}):
        with pytest.raises(ValueError, match="kernels of enable_fused_kernels do not offer"):
            dispatched_attention(query, query, query, **argument)


def test_heads_may_share_keys_and_values() -> None:
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 4, 2, 8)
    shared = dispatched_attention(query, key, key, enable_gqa=True)
    heads = [tensor.transpose(1, 2) for tensor in (query, key, key)]
    expected: Any = torch.nn.functional.scaled_dot_product_attention(*heads, enable_gqa=True)
    torch.testing.assert_close(shared, expected.transpose(1, 2))


@pytest.mark.parametrize(("queries", "keys"), [(2, 8), (4, 9), (8, 8)])
def test_a_mask_of_two_dimensions_is_of_the_keys_as_by_default(queries: int, keys: int) -> None:
    query, key = torch.randn(2, queries, 2, 8), torch.randn(2, keys, 2, 8)
    mask = torch.arange(keys) < torch.tensor([[3], [keys]])
    expected = dispatch_attention_fn(query, key, key, attn_mask=mask, backend="native")
    torch.testing.assert_close(dispatched_attention(query, key, key, attn_mask=mask), expected)


@torch.no_grad()
def test_new_processors_keep_the_kernels_until_they_are_disabled(calls: list[AttentionCall]) -> None:
    """Fusing projections makes new processors, and taking it back puts the old ones in place."""
    model = make_transformer(SD3Transformer2DModel)
    plain = call(model)
    enable_fused_kernels(model)
    for switch in (model.fuse_qkv_projections, model.unfuse_qkv_projections):
        switch()
        calls.clear()
        torch.testing.assert_close(call(model), plain)
        assert calls
    model.fuse_qkv_projections()
    disable_fused_kernels(model)
    calls.clear()
    call(model)
    model.unfuse_qkv_projections()
    call(model)
    assert not calls


def test_both_kinds_are_tried() -> None:
    assert (FluxTransformer2DModel, SD3Transformer2DModel) == TRANSFORMERS
