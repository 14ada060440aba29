"""What fused attention sends back, in each layout, with masks, bands, dropout and packed sequences."""

from __future__ import annotations

import pytest
import torch
import torch_npu

from tests.on_npu.helpers import FLOATS, SATURATES, assert_close
from tests.on_npu.inputs import numbers

pytestmark = pytest.mark.skipif(SATURATES, reason="310P has no kernel")
SCALE = 0.25
TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
Tensors = tuple[torch.Tensor, ...]


def operands(dtype: torch.dtype, heads: int = 3, key_heads: int = 3, queries: int = 32, keys: int = 32) -> Tensors:
    """Query, key, value and the gradient of the result, [batch, heads, length, head_dim]."""
    sizes = ((heads, queries), (key_heads, keys), (key_heads, keys), (heads, queries))
    return tuple(numbers((2, *size, 16), dtype, seed, -1, 1) for seed, size in enumerate(sizes))


def gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad: torch.Tensor,
    dropped: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
) -> Tensors:
    """Those of plain attention in float32, on the CPU; a query without any key has none."""
    leaves = [x.detach().float().requires_grad_() for x in (q, k, v)]
    query, key, value = leaves
    groups = query.shape[-3] // key.shape[-3]
    scores = query @ key.repeat_interleave(groups, -3).transpose(-1, -2) * SCALE
    if dropped is not None:
        dropped = dropped.expand(scores.shape)
        scores = scores.masked_fill(dropped, -1e30)
    shares = scores.softmax(-1)
    if dropped is not None:
        shares = shares * ~dropped.all(-1, keepdim=True)
    if factors is not None:
        shares = shares * factors
    out = shares @ value.repeat_interleave(groups, -3)
    return torch.autograd.grad(out, leaves, grad.float())


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "BNSD":
        return x
    x = x.transpose(1, 2)
    if layout == "BSND":
        return x.contiguous()
    return x.flatten(2).contiguous() if layout == "BSH" else x.flatten(2).transpose(0, 1).contiguous()


def compare(tensors: Tensors, layout: str, expected: Tensors, version: int = 1, **arguments: object) -> None:
    """The gradients of fused attention of `tensors`, [batch, heads, length, head_dim], are `expected`."""
    leaves = [lay_out(x, layout).to("npu").requires_grad_() for x in tensors[:3]]
    function = (torch_npu.npu_fusion_attention, torch_npu.npu_fusion_attention_v2)[version - 1]
    out = function(*leaves, tensors[0].shape[1], layout, scale=SCALE, **arguments)[0]
    found = torch.autograd.grad(out, leaves, lay_out(tensors[3], layout).to("npu"))
    for actual, gradient in zip(found, expected, strict=True):
        assert_close(actual, lay_out(gradient, layout), factor=16)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("version", (1, 2))
@pytest.mark.parametrize("layout", ("BSH", "BNSD", "BSND", "SBH"))
def test_layouts_and_masks(layout: str, version: int, dtype: torch.dtype) -> None:
    tensors = operands(dtype, keys=48)
    compare(tensors, layout, gradients(*tensors), version)
    dropped = torch.rand(2, 1, 32, 48, generator=torch.Generator().manual_seed(3)) < 0.3
    compare(tensors, layout, gradients(*tensors, dropped=dropped), version, atten_mask=dropped.to("npu"))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ("BSH", "BNSD", "BSND", "SBH"))
def test_queries_that_share_keys(layout: str, dtype: torch.dtype) -> None:
    tensors = operands(dtype, heads=4, key_heads=2)
    compare(tensors, layout, gradients(*tensors))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("queries, keys", [(32, 32), (16, 32), (32, 16)])
@pytest.mark.parametrize("mode, shift", [(2, 0), (3, None)])
def test_causal_modes(mode: int, shift: int | None, queries: int, keys: int, dtype: torch.dtype) -> None:
    tensors = operands(dtype, queries=queries, keys=keys)
    diagonal = 1 + (keys - queries if shift is None else shift)
    dropped = torch.ones(queries, keys, dtype=torch.bool).triu(diagonal)
    arguments = {"sparse_mode": mode, "atten_mask": TRIANGLE.to("npu")}
    compare(tensors, "BNSD", gradients(*tensors, dropped=dropped), **arguments)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", (0, 4))
def test_bands(mode: int, dtype: torch.dtype) -> None:
    tensors = operands(dtype)
    distance = torch.arange(32) - torch.arange(32).unsqueeze(-1)
    mask = TRIANGLE if mode else torch.zeros(32, 32, dtype=torch.bool)
    arguments = {"sparse_mode": mode, "atten_mask": mask.to("npu"), "pre_tockens": 5, "next_tockens": 2}
    compare(tensors, "BNSD", gradients(*tensors, dropped=(distance > 2) | (distance < -5)), **arguments)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_queries_without_any_key_send_nothing_back_where_that_is_asked_for(dtype: torch.dtype) -> None:
    tensors = operands(dtype)
    dropped = torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    dropped[0, :, 5], dropped[1, :, :, 20:] = True, True
    compare(tensors, "BSH", gradients(*tensors, dropped=dropped), atten_mask=dropped.to("npu"), inner_precise=2)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dropout(dtype: torch.dtype) -> None:
    """The way back drops the probabilities that the way forth has dropped."""
    tensors = operands(dtype, keys=16)
    q, k, _, grad = tensors
    v = torch.eye(16, dtype=dtype).expand(2, 3, 16, 16)  # the result is the probabilities
    leaves = [x.contiguous().to("npu").requires_grad_() for x in (q, k, v)]
    out = torch_npu.npu_fusion_attention(*leaves, 3, "BNSD", scale=SCALE, keep_prob=0.75)[0]
    factors = (out.detach().cpu() != 0).float() / 0.75
    assert 0.6 < factors.bool().float().mean() < 0.9
    found = torch.autograd.grad(out, leaves, grad.to("npu"))
    for actual, gradient in zip(found, gradients(q, k, v, grad, factors=factors), strict=True):
        assert_close(actual, gradient, factor=16)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("softmax_layout", ("", "TND"))
@pytest.mark.parametrize("mode, aligned", ((0, None), (2, "first"), (3, "last")))
def test_packed_sequences(mode: int, aligned: str | None, softmax_layout: str, dtype: torch.dtype) -> None:
    queries, keys = (5, 16, 1), (7, 16, 3)
    tensors = [numbers((sum(n), 3, 16), dtype, seed, -1, 1) for seed, n in enumerate((queries, keys, keys, queries))]
    arguments: dict[str, object] = {"scale": SCALE, "sparse_mode": mode, "softmax_layout": softmax_layout}
    if mode:
        arguments["atten_mask"] = TRIANGLE.to("npu")
    leaves = [x.to("npu").requires_grad_() for x in tensors[:3]]
    lengths = {"actual_seq_qlen": [5, 21, 22], "actual_seq_kvlen": [7, 23, 26]}
    out = torch_npu.npu_fusion_attention(*leaves, 3, "TND", **lengths, **arguments)[0]
    found = torch.autograd.grad(out, leaves, tensors[3].to("npu"))
    pieces = zip(*(x.split(n) for x, n in zip(tensors, (queries, keys, keys, queries), strict=True)), strict=True)
    expected = []
    for piece in pieces:
        q, k, v, grad = (x.transpose(0, 1) for x in piece)
        shift = k.shape[1] - q.shape[1] if aligned == "last" else 0
        causal = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1 + shift) if aligned else None
        expected.append([x.transpose(0, 1) for x in gradients(q, k, v, grad, dropped=causal)])
    for actual, *parts in zip(found, *expected, strict=True):
        assert_close(actual, torch.cat(parts), factor=16)


def test_packed_sequences_with_dropout_and_version_2() -> None:
    tensors = [numbers((12, 2, 16), torch.float32, seed, -1, 1) for seed in range(4)]
    v = torch.eye(16).repeat(1, 1)[:12].unsqueeze(1).expand(12, 2, 16)  # key i shows in channel i
    leaves = [x.contiguous().to("npu").requires_grad_() for x in (tensors[0], tensors[1], v)]
    lengths = {"actual_seq_qlen": [5, 12], "actual_seq_kvlen": [7, 12]}
    out = torch_npu.npu_fusion_attention_v2(*leaves, 2, "TND", scale=SCALE, keep_prob=0.75, **lengths)[0]
    found = torch.autograd.grad(out, leaves, tensors[3].to("npu"))
    kept = (out.detach().cpu() != 0).float() / 0.75
    expected = []
    for a, b in ((slice(0, 5), slice(0, 7)), (slice(5, 12), slice(7, 12))):
        q, k, value, grad = (x.transpose(0, 1) for x in (tensors[0][a], tensors[1][b], v[b], tensors[3][a]))
        factors = kept[a].transpose(0, 1)[..., b]
        expected.append([x.transpose(0, 1) for x in gradients(q, k, value, grad, factors=factors)])
    for actual, *parts in zip(found, *expected, strict=True):
        assert_close(actual, torch.cat(parts), factor=16)


def test_the_gradient_of_a_bias_is_not_a_number() -> None:
    """The operator does not write it; a card returns what its memory held."""
    q, k, v, grad = operands(torch.float32)
    bias = numbers((2, 3, 32, 32), torch.float32, seed=4).to("npu").requires_grad_()
    out = torch_npu.npu_fusion_attention(*(x.to("npu") for x in (q, k, v)), 3, "BNSD", pse=bias, scale=SCALE)[0]
    (found,) = torch.autograd.grad(out, [bias], grad.to("npu"))
    assert found.isnan().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("version, kind", [(1, 1), (2, 1), (2, 0)])
def test_a_bias_counts_on_the_way_back(version: int, kind: int, dtype: torch.dtype) -> None:
    tensors = operands(dtype)
    bias = numbers((2, 3, 32, 32), dtype, seed=4)
    leaves = [x.float().requires_grad_() for x in tensors[:3]]
    scores = leaves[0] @ leaves[1].transpose(-1, -2)
    scores = (scores + bias.float()) * SCALE if kind else scores * SCALE + bias.float()  # 1, the default: added first
    expected = torch.autograd.grad(scores.softmax(-1) @ leaves[2], leaves, tensors[3].float())
    arguments = {"pse_type": kind} if version == 2 else {}
    compare(tensors, "BNSD", expected, version, pse=bias.to("npu"), **arguments)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("masked", (False, True))
def test_scaled_dot_product_attention(masked: bool, dtype: torch.dtype) -> None:
    tensors = operands(dtype, keys=48)
    kept = torch.rand(2, 1, 32, 48, generator=torch.Generator().manual_seed(3)) < 0.7 if masked else None
    leaves = [x.to("npu").requires_grad_() for x in tensors[:3]]
    out = torch.nn.functional.scaled_dot_product_attention(
        *leaves, attn_mask=None if kept is None else kept.to("npu"), scale=SCALE
    )
    found = torch.autograd.grad(out, leaves, tensors[3].to("npu"))
    expected = gradients(*tensors, dropped=None if kept is None else ~kept)
    for actual, gradient in zip(found, expected, strict=True):
        assert_close(actual, gradient, factor=16)
