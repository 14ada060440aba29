"""The fused attention operators against a plain float32 softmax, and what each chip refuses."""

from __future__ import annotations

import math

import pytest
import torch
import torch_npu

from tests.on_npu.helpers import FLOATS, SATURATES, assert_close
from tests.on_npu.inputs import numbers

HALVES = [dtype for dtype in FLOATS if dtype != torch.float32]
ALL_TOKENS = 2**31 - 1
only_310p = pytest.mark.skipif(not SATURATES, reason="of 310P")
not_310p = pytest.mark.skipif(SATURATES, reason="310P has no kernel")


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, dropped: torch.Tensor | None = None
) -> torch.Tensor:
    """[batch, heads, length, head_dim] in float32."""
    scores = q.float() @ k.float().transpose(-1, -2) * scale
    if dropped is not None:
        scores = scores.masked_fill(dropped, -math.inf)
    return scores.softmax(-1) @ v.float()


def operands(
    dtype: torch.dtype, batch: int = 2, heads: int = 3, queries: int = 32, keys: int = 32, head_dim: int = 16
) -> list[torch.Tensor]:
    lengths = (queries, keys, keys)
    return [numbers((batch, heads, n, head_dim), dtype, seed, -1, 1) for seed, n in enumerate(lengths)]


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "BNSD":
        return x
    x = x.transpose(1, 2).contiguous()
    return x if layout == "BSND" else x.flatten(2)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("layout", ("BSH", "BNSD", "BSND"))
@pytest.mark.parametrize("keys", (32, 77))
def test_prompt_attention_without_a_mask(keys: int, layout: str, dtype: torch.dtype) -> None:
    q, k, v = operands(dtype, keys=keys)
    out = torch_npu.npu_prompt_flash_attention(
        *(lay_out(x, layout).to("npu") for x in (q, k, v)), num_heads=3, scale_value=0.25, input_layout=layout
    )
    assert_close(out, lay_out(attention(q, k, v, 0.25), layout), factor=4)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_defaults_of_prompt_attention_are_scale_one_and_one_head(dtype: torch.dtype) -> None:
    q, k, v = (lay_out(x, "BSH") for x in operands(dtype))
    out = torch_npu.npu_prompt_flash_attention(*(x.to("npu") for x in (q, k, v)))
    expected = attention(*(x.unsqueeze(1) for x in (q, k, v)), scale=1).squeeze(1)
    assert_close(out, expected, factor=4)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_prompt_attention_drops_where_the_mask_is_true_and_beyond_next_tokens(dtype: torch.dtype) -> None:
    q, k, v = operands(dtype)
    dropped = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(3)) < 0.3
    arguments = {"num_heads": 3, "scale_value": 0.25, "input_layout": "BNSD", "atten_mask": dropped.to("npu")}
    there = [x.to("npu") for x in (q, k, v)]
    out = torch_npu.npu_prompt_flash_attention(*there, next_tokens=ALL_TOKENS, **arguments)
    assert_close(out, attention(q, k, v, 0.25, dropped), factor=4)
    out = torch_npu.npu_prompt_flash_attention(*there, **arguments)  # next_tokens is 0: nothing above the diagonal
    above = torch.ones(32, 32, dtype=torch.bool).triu(1)
    expected = attention(q, k, v, 0.25, (dropped | above).index_fill(3, torch.tensor([0]), False) | dropped)
    rows = ~(dropped | above).all(-1)  # rows that keep a key; what the operator gives for others is not defined
    assert torch.allclose(out.cpu().float()[rows.expand(2, 3, 32)], expected[rows.expand(2, 3, 32)], atol=0.02)


@not_310p
@pytest.mark.parametrize("sparse_mode, rounded", ((0, True), (10, False)))
def test_910b_keeps_float16_scores_in_float16_unless_asked_for_precision(sparse_mode: int, rounded: bool) -> None:
    q, k, v = (x * 4 for x in operands(torch.float16, head_dim=128))
    out = torch_npu.npu_prompt_flash_attention(
        *(x.to("npu") for x in (q, k, v)), num_heads=3, input_layout="BNSD", sparse_mode=sparse_mode
    )
    scores = q.float() @ k.float().transpose(-1, -2)
    expected = (scores.half().float() if rounded else scores).softmax(-1) @ v.float()
    assert_close(out, expected, factor=4)


@only_310p
def test_310p_gives_a_fully_masked_row_the_softmax_of_its_scores() -> None:
    q, k, v = operands(torch.float16)
    dropped = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    dropped[..., 5, :] = True
    out = torch_npu.npu_prompt_flash_attention(
        *(x.to("npu") for x in (q, k, v)),
        **{"num_heads": 3, "scale_value": 0.25, "input_layout": "BNSD", "next_tokens": ALL_TOKENS},
        atten_mask=dropped.to("npu"),
    )
    torch.testing.assert_close(out.cpu().float()[:, :, 5], attention(q, k, v, 0.25)[:, :, 5], atol=0.01, rtol=0)


REFUSALS_310P = {
    "float32": ({"dtype": torch.float32}, {}, "must be float16"),
    "mask over 77 keys": ({"keys": 77}, {"mask": (32, 77)}, "attention mask must be NULL"),
    "mask over unequal lengths": ({"keys": 48}, {"mask": (32, 48)}, "attention mask must be NULL"),
    "mask over 17 tokens": ({"queries": 17, "keys": 17}, {"mask": (17, 17)}, "attention mask must be NULL"),
    "pre_tokens": ({}, {"pre_tokens": 8}, "pre_tokens"),
    "next_tokens": ({}, {"next_tokens": 8}, "next_tokens"),
    "sparse_mode": ({}, {"sparse_mode": 2}, "sparse_mode"),
    "grouped queries": ({}, {"num_key_value_heads": 3}, "num_key_value_heads"),
    "head_dim": ({"head_dim": 528}, {}, "head_dim"),
    "batch": ({"batch": 129, "queries": 2, "keys": 2}, {}, "batch"),
    "sequence lengths": ({}, {"actual_seq_lengths": [8, 8]}, "actual_seq_lengths"),
}


@only_310p
@pytest.mark.parametrize("name", REFUSALS_310P)
def test_what_310p_refuses(name: str) -> None:
    shape, arguments, message = REFUSALS_310P[name]
    arguments = dict(arguments)
    if "mask" in arguments:
        arguments["atten_mask"] = torch.zeros(arguments.pop("mask"), dtype=torch.bool, device="npu")
    q, k, v = (x.to("npu") for x in operands(**{"dtype": torch.float16, **shape}))
    with pytest.raises(RuntimeError, match=message):
        torch_npu.npu_prompt_flash_attention(q, k, v, num_heads=3, input_layout="BNSD", **arguments)


@only_310p
def test_310p_takes_bool_masks_only() -> None:
    q, k, v = (x.to("npu") for x in operands(torch.float16))
    mask = torch.zeros(32, 32, dtype=torch.int8, device="npu")
    with pytest.raises(RuntimeError, match="must be bool"):
        torch_npu.npu_prompt_flash_attention(q, k, v, num_heads=3, input_layout="BNSD", atten_mask=mask)


@only_310p
def test_310p_has_no_other_fused_attention_and_no_bfloat16() -> None:
    q, k, v = (x.to("npu") for x in operands(torch.float16))
    with pytest.raises(RuntimeError, match="no kernel for this chip"):
        torch_npu.npu_fusion_attention(q, k, v, 3, "BNSD")
    with pytest.raises(RuntimeError, match="no kernel for this chip"):
        torch_npu.npu_fused_infer_attention_score(q, k, v, num_heads=3, input_layout="BNSD")
    x = torch.zeros(3, dtype=torch.bfloat16).to("npu")  # torch_npu lets it in, the first kernel does not
    with pytest.raises(RuntimeError, match="bfloat16, which Ascend310P3 does not have"):
        (x + x).cpu()


@not_310p
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("layout", ("BSH", "BNSD", "BSND"))
def test_inference_attention(layout: str, dtype: torch.dtype) -> None:
    q, k, v = operands(dtype, keys=77)
    there = [lay_out(x, layout).to("npu") for x in (q, k, v)]
    dropped = torch.rand(2, 1, 32, 77, generator=torch.Generator().manual_seed(3)) < 0.3
    for mask in (None, dropped):
        out, lse = torch_npu.npu_fused_infer_attention_score(
            *there,
            **{"num_heads": 3, "scale": 0.25, "input_layout": layout, "softmax_lse_flag": True},
            atten_mask=None if mask is None else mask.to("npu"),
        )
        assert_close(out, lay_out(attention(q, k, v, 0.25, mask), layout), factor=4)
        scores = q.float() @ k.float().transpose(-1, -2) * 0.25
        expected = (scores if mask is None else scores.masked_fill(mask, -math.inf)).logsumexp(-1, keepdim=True)
        assert_close(lse, expected, factor=8)


@not_310p
def test_inference_attention_with_grouped_queries_causal_masks_and_lengths() -> None:
    q, _, _ = operands(torch.float16, heads=4)
    _, k, v = operands(torch.float16, heads=2)
    out, _ = torch_npu.npu_fused_infer_attention_score(
        *(x.to("npu") for x in (q, k, v)), num_heads=4, num_key_value_heads=2, scale=0.25, input_layout="BNSD"
    )
    repeated = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    assert_close(out, attention(q, *repeated, 0.25), factor=4)

    triangle = torch.ones(2048, 2048, dtype=torch.bool).triu(1).to("npu")
    q, k, v = operands(torch.float16)
    arguments = {"num_heads": 3, "scale": 0.25, "input_layout": "BNSD"}
    there = [x.to("npu") for x in (q, k, v)]
    for mode in (2, 3):
        out, _ = torch_npu.npu_fused_infer_attention_score(*there, atten_mask=triangle, sparse_mode=mode, **arguments)
        causal = torch.ones(32, 32, dtype=torch.bool).triu(1)
        assert_close(out, attention(q, k, v, 0.25, causal), factor=4)

    out, _ = torch_npu.npu_fused_infer_attention_score(*there, actual_seq_lengths_kv=[32, 20], **arguments)
    beyond = torch.zeros(2, 1, 1, 32, dtype=torch.bool)
    beyond[1, ..., 20:] = True
    assert_close(out, attention(q, k, v, 0.25, beyond), factor=4)


@not_310p
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("layout", ("BSH", "BNSD", "BSND"))
def test_inference_attention_of_version_2(layout: str, dtype: torch.dtype) -> None:
    q, k, v = operands(dtype, keys=77)
    dropped = torch.rand(2, 1, 32, 77, generator=torch.Generator().manual_seed(3)) < 0.3
    out, lse = torch_npu.npu_fused_infer_attention_score_v2(
        *(lay_out(x, layout).to("npu") for x in (q, k, v)),
        **{"num_query_heads": 3, "softmax_scale": 0.25, "input_layout": layout, "return_softmax_lse": True},
        atten_mask=dropped.to("npu"),
    )
    assert_close(out, lay_out(attention(q, k, v, 0.25, dropped), layout), factor=4)
    scores = (q.float() @ k.float().transpose(-1, -2) * 0.25).masked_fill(dropped, -math.inf)
    assert_close(lse, scores.logsumexp(-1, keepdim=True), factor=8)


REFUSALS_910B = {
    "float32": ({"dtype": torch.float32}, {}, "float16, bfloat16"),
    "head_dim 20": ({"head_dim": 20}, {}, "multiple of 16"),
    "head_dim 528": ({"head_dim": 528}, {}, "at most 512"),
    "sparse_mode": ({}, {"sparse_mode": 7}, "sparse_mode"),
    "small causal mask": ({}, {"sparse_mode": 2, "mask": (32, 32)}, "2048"),
}


@not_310p
@pytest.mark.parametrize("name", REFUSALS_910B)
def test_what_910b_refuses(name: str) -> None:
    shape, arguments, message = REFUSALS_910B[name]
    arguments = dict(arguments)
    if "mask" in arguments:
        arguments["atten_mask"] = torch.zeros(arguments.pop("mask"), dtype=torch.bool, device="npu")
    q, k, v = (x.to("npu") for x in operands(**{"dtype": torch.float16, **shape}))
    with pytest.raises(RuntimeError, match=message):
        torch_npu.npu_fused_infer_attention_score(q, k, v, num_heads=3, input_layout="BNSD", **arguments)


@not_310p
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ("BSH", "BNSD", "BSND", "SBH"))
def test_fusion_attention(layout: str, dtype: torch.dtype) -> None:
    q, k, v = operands(dtype, keys=48)
    batch_second = layout == "SBH"
    there = [lay_out(x, "BSH").transpose(0, 1) if batch_second else lay_out(x, layout) for x in (q, k, v)]
    dropped = torch.rand(2, 1, 32, 48, generator=torch.Generator().manual_seed(3)) < 0.3
    for mask in (None, dropped):
        out, maximum, total, *_ = torch_npu.npu_fusion_attention(
            *(x.to("npu") for x in there),
            *(3, layout),
            scale=0.25,
            atten_mask=None if mask is None else mask.to("npu"),
        )
        scores = q.float() @ k.float().transpose(-1, -2) * 0.25
        scores = scores if mask is None else scores.masked_fill(mask, -math.inf)
        expected = scores.softmax(-1) @ v.float()
        expected = lay_out(expected, "BSH").transpose(0, 1) if batch_second else lay_out(expected, layout)
        assert_close(out, expected, factor=8)
        peak = scores.amax(-1, keepdim=True)
        assert_close(maximum, peak.expand(-1, -1, -1, 8), factor=8)
        assert_close(total, (scores - peak).exp().sum(-1, keepdim=True).expand(-1, -1, -1, 8), factor=16)


@not_310p
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("version", (1, 2))
def test_fusion_attention_with_a_bias_and_a_band(version: int, dtype: torch.dtype) -> None:
    function = (torch_npu.npu_fusion_attention, torch_npu.npu_fusion_attention_v2)[version - 1]
    q, k, v = operands(dtype)
    bias = numbers((2, 3, 32, 32), dtype, seed=4)
    distance = torch.arange(32) - torch.arange(32).unsqueeze(-1)
    before, after = ("pre_tockens", "next_tockens") if version == 1 else ("pre_tokens", "next_tokens")
    mask = torch.zeros(32, 32, dtype=torch.bool)
    out, maximum, total, *_ = function(
        *(x.to("npu") for x in (q, k, v)),
        *(3, "BNSD"),
        **{"scale": 0.25, "pse": bias.to("npu"), "atten_mask": mask.to("npu"), before: 5, after: 2},
    )
    scores = (q.float() @ k.float().transpose(-1, -2) + bias.float()) * 0.25  # the default, pse_type 1: added first
    scores = scores.masked_fill((distance > 2) | (distance < -5), -math.inf)
    assert_close(out, scores.softmax(-1) @ v.float(), factor=8)
    peak = scores.amax(-1, keepdim=True)
    assert_close(maximum, peak.expand(-1, -1, -1, 8), factor=8)
    assert_close(total, (scores - peak).exp().sum(-1, keepdim=True).expand(-1, -1, -1, 8), factor=16)


@not_310p
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fusion_attention_with_dropout(dtype: torch.dtype) -> None:
    q, k, _ = operands(dtype, keys=16)
    v = torch.eye(16, dtype=dtype).expand(2, 3, 16, 16)  # the result is the probabilities
    arguments = {"head_num": 3, "input_layout": "BNSD", "scale": 0.25, "keep_prob": 0.75}
    out = torch_npu.npu_fusion_attention(*(x.to("npu") for x in (q, k, v)), **arguments)[0]
    kept = out.cpu() != 0
    assert_close(out, attention(q, k, v, 0.25) * kept / 0.75, factor=4)
    assert abs(kept.float().mean().item() - 0.75) < 0.05


@not_310p
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("softmax_layout", ("", "TND"))
@pytest.mark.parametrize("mode, aligned", ((0, None), (2, "first"), (3, "last")))
def test_fusion_attention_of_packed_sequences(
    mode: int, aligned: str | None, softmax_layout: str, dtype: torch.dtype
) -> None:
    queries, keys = (5, 16, 1), (7, 16, 3)
    q, k, v = (numbers((sum(n), 3, 16), dtype, seed, -1, 1) for seed, n in enumerate((queries, keys, keys)))
    arguments = {"scale": 0.25, "sparse_mode": mode, "softmax_layout": softmax_layout}
    if mode:
        arguments["atten_mask"] = torch.ones(2048, 2048, dtype=torch.bool).triu(1).to("npu")
    out, maximum, total, *_ = torch_npu.npu_fusion_attention(
        *(x.to("npu") for x in (q, k, v)),
        *(3, "TND"),
        actual_seq_qlen=[5, 21, 22],
        actual_seq_kvlen=[7, 23, 26],
        **arguments,
    )
    results, peaks, totals = [], [], []
    for a, b, c in zip(q.split(queries), k.split(keys), v.split(keys), strict=True):
        a, b, c = (x.float().transpose(0, 1) for x in (a, b, c))
        scores = a @ b.transpose(-1, -2) * 0.25
        if aligned:
            shift = b.shape[1] - a.shape[1] if aligned == "last" else 0
            scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + shift), -math.inf)
        results.append((scores.softmax(-1) @ c).transpose(0, 1))
        peak = scores.amax(-1, keepdim=True)
        for statistic, rows in ((peak, peaks), (torch.exp(scores - peak).sum(-1, keepdim=True), totals)):
            # Otherwise the heads of a sequence come one after the other, in a tensor of the same shape.
            rows.append(statistic.transpose(0, 1) if softmax_layout else statistic.reshape(-1, 3, 1))
    assert_close(out, torch.cat(results), factor=8)
    assert_close(maximum, torch.cat(peaks).expand(-1, -1, 8), factor=8)
    assert_close(total, torch.cat(totals).expand(-1, -1, 8), factor=16)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("masked", (False, True))
def test_scaled_dot_product_attention(masked: bool, dtype: torch.dtype) -> None:
    q, k, v = operands(dtype, keys=48)
    kept = torch.rand(2, 1, 32, 48, generator=torch.Generator().manual_seed(3)) < 0.7 if masked else None
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.to("npu") for x in (q, k, v)), attn_mask=None if kept is None else kept.to("npu")
    )
    expected = attention(q, k, v, 0.25, None if kept is None else ~kept)
    # 310P computes float32 products in float16, and the softmax between the two products is rounded as well.
    assert_close(out, expected, factor=1000 if dtype == torch.float32 else 8)
