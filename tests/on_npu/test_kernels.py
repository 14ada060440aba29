"""Which kernel `processors.attention` takes on a chip, with a gradient and without, and what it computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch_npu  # noqa: F401

from processors import attention
from processors.kernels import attention as module
from processors.kernels.call import AttentionCall
from processors.kernels.select import Kernel, check_kernels, explain, select_kernel
from processors.models import resnet
from processors.models.clip import exact_gelu
from processors.models.self_attentions import largest_call
from tests.on_npu.helpers import FLOATS, SATURATES, assert_close
from tests.on_npu.inputs import numbers
from tests.tiny_models import tiny_unet

MASKS = (None, "causal", "keys", "each head")
INFERENCE = "npu_prompt_flash_attention" if SATURATES else "npu_fused_infer_attention_score"
HALVES = [dtype for dtype in FLOATS if dtype != torch.float32]


def some_mask(kind: str | None) -> torch.Tensor | None:
    kept = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3)) < 0.7
    return {"keys": kept[:, :1, :1], "each head": kept}.get(kind or "")


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []

    def record(call: AttentionCall) -> Kernel:
        names.append(select_kernel(call).name)
        return select_kernel(call)

    monkeypatch.setattr(module, "select_kernel", record)
    return names


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("needs_grad", (False, True))
def test_attention_equals_that_of_the_cpu_with_and_without_a_gradient(
    npu: torch.device, monkeypatch: pytest.MonkeyPatch, needs_grad: bool, mask: str | None, dtype: torch.dtype
) -> None:
    query, key, value = (numbers((2, 32, 48), dtype, seed, -1, 1) for seed in range(3))
    tensor, causal = some_mask(mask), mask == "causal"
    expected = attention(query.float(), key.float(), value.float(), 3, tensor, causal)
    names = recorded(monkeypatch)
    there = [x.to(npu).requires_grad_(needs_grad) for x in (query, key, value)]
    out = attention(*there, 3, None if tensor is None else tensor.to(npu), causal)
    # 310P computes float32 products in float16, and the softmax between the two products is rounded as well.
    assert_close(out.detach(), expected, factor=1000 if dtype == torch.float32 else 8)
    assert out.requires_grad == needs_grad
    if needs_grad:
        assert names == ["sliced_attention" if SATURATES else "npu_fusion_attention"]
        assert SATURATES or "NpuFusionAttentionBackward" in derivatives(out)
    elif dtype in HALVES and mask != "each head":
        assert names == [INFERENCE]


def derivatives(out: torch.Tensor) -> set[str]:
    """The names of all that a backward pass from `out` would compute."""
    names, waiting = set(), [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None:
            names.add(node.name().rstrip("0123456789"))
            waiting += [following for following, _ in node.next_functions]
    return names


def test_no_operator_without_a_derivative_is_taken_where_a_gradient_is_needed(npu: torch.device) -> None:
    """torch_npu lets such an operator through, with a warning, and the gradients of all before it are wrong."""
    x = numbers((2, 16, 8, 8), torch.float16).to(npu).requires_grad_()
    norm = torch.nn.GroupNorm(4, 16, dtype=torch.float16).to(npu)
    fused = torch.ops.npu.npu_group_norm_silu(x, norm.weight, norm.bias, 4, norm.eps)[0]
    assert "SiluBackward" not in derivatives(fused) and "NativeGroupNormBackward" not in derivatives(fused)
    assert {"SiluBackward", "NativeGroupNormBackward"} <= derivatives(resnet.group_norm_silu(norm, x))
    assert "NpuGeluBackward" in derivatives(exact_gelu(x))  # this one has one
    with torch.no_grad():
        expected = F.silu(F.group_norm(x.cpu().float(), 4, eps=norm.eps))
        assert_close(resnet.group_norm_silu(norm, x), expected, factor=8)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_user_may_rule_the_fused_operator_out(
    npu: torch.device, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    query, key, value = (numbers((2, 32, 48), dtype, seed, -1, 1) for seed in range(3))
    expected = attention(query.float(), key.float(), value.float(), 3)
    names = recorded(monkeypatch)
    for choice in (["sdpa"], ["sliced"]):
        out = attention(*(x.to(npu) for x in (query, key, value)), 3, kernels=check_kernels(choice))
        assert_close(out, expected, factor=8)
    last = "sliced_attention"  # torch's attention would hold all scores at once on 310P
    assert names == [last if SATURATES else "scaled_dot_product_attention", last]


def test_the_largest_call_of_a_unet_is_explained_for_this_chip(npu: torch.device, chip: str) -> None:
    call = largest_call(tiny_unet().half(), 2, 96, 96, npu)
    assert (call.chip, call.query_length, call.dtype) == (chip, 9216, torch.float16)
    name = INFERENCE if SATURATES else "scaled_dot_product_attention"  # 910B: heads of 8 are no multiple of 16
    assert explain(call).startswith(f"{name} for ")
