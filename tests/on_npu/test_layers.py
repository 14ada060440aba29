"""Activations, normalisations, resizing and the fused operators, against float32 on the CPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torch_npu

from tests.on_npu.helpers import FLOATS, LAYOUTS, SATURATES, assert_close, on_npu, reference
from tests.on_npu.inputs import numbers

Function = Callable[[torch.Tensor], torch.Tensor]

LAYERS: dict[str, Function] = {
    "silu": F.silu,
    "softmax": lambda x: F.softmax(x, dim=1),
    "layer norm": lambda x: F.layer_norm(x, (8,)),
    "group norm": lambda x: F.group_norm(x, 2),
    "nearest": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
    "nearest to size": lambda x: F.interpolate(x, size=(7, 11), mode="nearest"),
    "bilinear": lambda x: F.interpolate(x, size=(7, 11), mode="bilinear"),
    "bicubic": lambda x: F.interpolate(x, scale_factor=2.0, mode="bicubic"),
    "leaky relu": lambda x: F.leaky_relu(x, 0.1),
    "glu": lambda x: F.glu(x, dim=1),
    "average pool": lambda x: F.avg_pool2d(x, 2),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, dtype: torch.dtype) -> None:
    x = numbers((2, 4, 6, 8), dtype)
    for layout in LAYOUTS.values():
        assert_close(LAYERS[name](on_npu(x, layout)), LAYERS[name](reference(x)), factor=4)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_norms_with_weights(dtype: torch.dtype) -> None:
    x, weight, bias = numbers((2, 4, 6), dtype), numbers((6,), dtype, seed=1), numbers((6,), dtype, seed=2)
    expected = F.layer_norm(reference(x), (6,), reference(weight), reference(bias), 1e-3)
    assert_close(F.layer_norm(x.to("npu"), (6,), weight.to("npu"), bias.to("npu"), 1e-3), expected, factor=4)
    weight, bias = numbers((4,), dtype, seed=1), numbers((4,), dtype, seed=2)
    expected = F.group_norm(reference(x), 2, reference(weight), reference(bias), 1e-3)
    assert_close(F.group_norm(x.to("npu"), 2, weight.to("npu"), bias.to("npu"), 1e-3), expected, factor=4)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_statistics_of_norms(dtype: torch.dtype) -> None:
    x, weight, bias = numbers((2, 6, 5), dtype), numbers((6,), dtype, seed=1), numbers((6,), dtype, seed=2)
    wide = [reference(t) for t in (x, weight, bias)]
    _, mean, rstd = torch.native_layer_norm(x.to("npu"), (5,), None, None, 1e-3)
    _, *expected = torch.native_layer_norm(wide[0], (5,), None, None, 1e-3)
    for actual, wanted in zip((mean, rstd), expected, strict=True):
        assert_close(actual, wanted, factor=4)
    actual = torch.native_group_norm(*(t.to("npu") for t in (x, weight, bias)), 2, 6, 5, 3, 1e-3)
    for result, wanted in zip(actual, torch.native_group_norm(*wide, 2, 6, 5, 3, 1e-3), strict=True):
        assert_close(result, wanted, factor=8)


COMPATIBLE = """
import torch, torch_npu
torch.npu.set_compile_mode(jit_compile=False)
torch.npu.use_compatible_impl(True)
x, weight, bias = torch.arange(12.0).view(2, 6) ** 2, torch.arange(6.0), torch.arange(6.0).flip(0)
actual = torch.nn.functional.layer_norm(x.npu(), (6,), weight.npu(), bias.npu(), 1e-3).cpu()
torch.testing.assert_close(actual, torch.nn.functional.layer_norm(x, (6,), weight, bias, 1e-3))
"""


def test_layer_norm_of_the_compatible_implementation() -> None:
    subprocess.run([sys.executable, "-c", COMPATIBLE], check=True)  # torch_npu asks once in a process


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_npu_add_layer_norm(dtype: torch.dtype) -> None:
    x, y = numbers((3, 5, 32), dtype), numbers((3, 5, 32), dtype, seed=1)
    gamma, beta = numbers((32,), dtype, seed=2), numbers((32,), dtype, seed=3)
    there = [t.to("npu") for t in (x, y, gamma, beta)]
    out, mean, rstd, total = torch_npu.npu_add_layer_norm(*there, epsilon=1e-3, additional_output=True)
    added = reference(x) + reference(y)
    assert_close(out, F.layer_norm(added, (32,), reference(gamma), reference(beta), 1e-3), factor=8)
    assert_close(mean, added.mean(-1, keepdim=True), factor=4)
    assert_close(rstd, torch.rsqrt(added.var(-1, correction=0, keepdim=True) + 1e-3), factor=4)
    assert_close(total, added)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_npu_add_rms_norm(dtype: torch.dtype) -> None:
    x, y, gamma = (numbers(shape, dtype, i) for i, shape in enumerate(((3, 5, 32), (3, 5, 32), (32,))))
    out, rstd, total = torch_npu.npu_add_rms_norm(x.to("npu"), y.to("npu"), gamma.to("npu"), epsilon=1e-3)
    added = reference((reference(x) + reference(y)).to(dtype))
    scale = torch.rsqrt(added.square().mean(-1, keepdim=True) + 1e-3)
    assert_close(out, added * scale * reference(gamma), factor=4)
    assert_close(rstd, scale, factor=4)
    assert_close(total, added)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_npu_add_rms_norm_in_place(dtype: torch.dtype) -> None:
    x, y, gamma = (numbers(shape, dtype, i) for i, shape in enumerate(((3, 5, 32), (3, 5, 32), (32,))))
    normed, added = x.to("npu"), y.to("npu")
    rstd = torch_npu.npu_add_rms_norm_v2(normed, added, gamma.to("npu"), epsilon=1e-3)
    expected = reference((reference(x) + reference(y)).to(dtype))
    scale = torch.rsqrt(expected.square().mean(-1, keepdim=True) + 1e-3)
    assert_close(added, expected)
    assert_close(normed, expected * scale * reference(gamma), factor=4)
    assert_close(rstd, scale, factor=4)


@pytest.mark.skipif(SATURATES, reason="310P has no kernel")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_npu_gemma_rms_norm(dtype: torch.dtype) -> None:
    x, gamma = numbers((3, 5, 32), dtype), numbers((32,), dtype, seed=1)
    out, rstd = torch_npu.npu_gemma_rms_norm(x.to("npu"), gamma.to("npu"), epsilon=1e-3)
    scale = torch.rsqrt(reference(x).square().mean(-1, keepdim=True) + 1e-3)
    assert_close(out, reference(x) * scale * (1 + reference(gamma)), factor=4)
    assert_close(rstd, scale, factor=4)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_npu_layer_norm_eval(dtype: torch.dtype) -> None:
    x, weight, bias = (numbers(shape, dtype, i) for i, shape in enumerate(((3, 5, 32), (5, 32), (5, 32))))
    out = torch_npu.npu_layer_norm_eval(x.to("npu"), (5, 32), weight.to("npu"), bias.to("npu"), eps=1e-3)
    assert_close(out, F.layer_norm(reference(x), (5, 32), reference(weight), reference(bias), 1e-3), factor=8)


@pytest.mark.parametrize("descending", (False, True))
@pytest.mark.parametrize("dim", (0, -1))
def test_npu_sort_v2(dim: int, descending: bool) -> None:
    x = numbers((4, 9), torch.float16)
    sorted_values = torch_npu.npu_sort_v2(x.to("npu"), dim=dim, descending=descending)
    assert_close(sorted_values, x.sort(dim, descending)[0])


@pytest.mark.parametrize("transpose_first", (False, True))
def test_npu_confusion_transpose(transpose_first: bool) -> None:
    x = numbers((2, 3, 4, 6), torch.float16)
    order, shape = ((0, 2, 1, 3), (2, 4, 18)) if transpose_first else ((1, 0, 2), (2, 3, 24))
    expected = x.permute(order).reshape(shape) if transpose_first else x.reshape(shape).permute(order)
    assert_close(torch_npu.npu_confusion_transpose(x.to("npu"), order, shape, transpose_first), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_masked_softmax(dtype: torch.dtype) -> None:
    x, dropped = numbers((2, 3, 32, 64), dtype), numbers((2, 3, 32, 64), torch.bool, seed=1)
    expected = reference(x).masked_fill(dropped, -torch.inf).softmax(-1)
    assert_close(torch._masked_softmax(x.to("npu"), dropped.to("npu"), -1, 2), expected, factor=4)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_npu_fast_gelu(dtype: torch.dtype) -> None:
    x = numbers((2, 6, 4, 8), dtype)
    assert_close(torch_npu.npu_fast_gelu(x.to("npu")), reference(x) * torch.sigmoid(1.702 * reference(x)), factor=4)


@pytest.mark.skipif(SATURATES, reason="310P has no kernel")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_activations_of_910b(dtype: torch.dtype) -> None:
    x, weight, bias = numbers((2, 6, 4, 8), dtype), numbers((6,), dtype, seed=1), numbers((6,), dtype, seed=2)
    wide = reference(x)
    left, right = wide.chunk(2, dim=-1)
    for approximate in ("none", "tanh"):
        actual = torch_npu.npu_gelu_mul(x.to("npu"), approximate=approximate)
        assert_close(actual, F.gelu(left, approximate=approximate) * right, factor=4)
    there = x.to("npu"), 3, weight.to("npu"), bias.to("npu")
    out, mean, rstd = torch_npu.npu_group_norm_swish(*there, eps=1e-3, swish_scale=0.5)
    normed = F.group_norm(wide, 3, reference(weight), reference(bias), 1e-3)
    assert_close(out, normed * torch.sigmoid(0.5 * normed), factor=8)
    groups = wide.view(2, 3, -1)
    assert_close(mean, groups.mean(-1), factor=4)
    assert_close(rstd, torch.rsqrt(groups.var(-1, correction=0) + 1e-3), factor=4)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gelu_is_the_tanh_form_whatever_is_asked_for(dtype: torch.dtype) -> None:
    x = numbers((5, 16), dtype)
    for approximate in ("none", "tanh"):
        assert_close(F.gelu(x.to("npu"), approximate=approximate), F.gelu(reference(x), approximate="tanh"), factor=4)
    for approximate in ("none", "tanh"):
        expected = F.gelu(reference(x), approximate=approximate)
        assert_close(torch_npu.npu_gelu(x.to("npu"), approximate=approximate), expected, factor=4)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_npu_geglu(dtype: torch.dtype) -> None:
    x = numbers((3, 5, 16), dtype)
    left, right = reference(x).chunk(2, dim=-1)
    for approximate, form in ((0, "none"), (1, "tanh")):
        out, gelu = torch_npu.npu_geglu(x.to("npu"), dim=-1, approximate=approximate)
        assert_close(gelu, F.gelu(right, approximate=form), factor=4)
        assert_close(out, left * F.gelu(right, approximate=form), factor=4)
    out, _ = torch_npu.npu_geglu(x.to("npu"), dim=-1, approximate=0, activate_left=True)
    assert_close(out, F.gelu(left) * right, factor=4)
    assert_close(
        torch_npu.npu_geglu(x.to("npu"))[0], left * F.gelu(right, approximate="tanh"), factor=4
    )  # the default
    with pytest.raises(RuntimeError, match="must be even"):
        torch_npu.npu_geglu(torch.ones(3, 5, device="npu", dtype=dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_npu_swiglu(dtype: torch.dtype) -> None:
    x = numbers((3, 5, 64), dtype)
    gate, value = reference(x).chunk(2, dim=-1)
    assert_close(torch_npu.npu_swiglu(x.to("npu"), dim=-1), F.silu(gate) * value, factor=4)
    if SATURATES:
        with pytest.raises(RuntimeError, match="multiple of 64 bytes"):
            torch_npu.npu_swiglu(torch.ones(3, 6, device="npu", dtype=dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_npu_rms_norm(dtype: torch.dtype) -> None:
    x, gamma = numbers((3, 5, 32), dtype), numbers((32,), dtype, seed=1)
    out, rstd = torch_npu.npu_rms_norm(x.to("npu"), gamma.to("npu"), 1e-5)
    scale = torch.rsqrt(reference(x).square().mean(-1, keepdim=True) + 1e-5)
    assert_close(out, reference(x) * scale * reference(gamma), factor=4)
    assert_close(rstd, scale, factor=4)
    if SATURATES:
        with pytest.raises(RuntimeError, match="at least 32 bytes"):
            torch_npu.npu_rms_norm(
                torch.ones(3, 4, device="npu", dtype=dtype), torch.ones(4, device="npu", dtype=dtype)
            )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_npu_group_norm_silu(dtype: torch.dtype) -> None:
    x, weight, bias = numbers((2, 6, 4, 5), dtype), numbers((6,), dtype, seed=1), numbers((6,), dtype, seed=2)
    out, mean, rstd = torch_npu.npu_group_norm_silu(x.to("npu"), weight.to("npu"), bias.to("npu"), 3, eps=1e-4)
    expected = F.silu(F.group_norm(reference(x), 3, reference(weight), reference(bias), 1e-4))
    assert_close(out, expected, factor=8)
    groups = reference(x).view(2, 3, -1)
    assert_close(mean, groups.mean(-1), factor=4)
    assert_close(rstd, torch.rsqrt(groups.var(-1, correction=0) + 1e-4), factor=4)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mode: str) -> torch.Tensor:
    if mode == "half":
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-right, left], dim=-1) * sin
    return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2) * sin


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", ("half", "interleave"))
def test_npu_rotary_mul(mode: str, dtype: torch.dtype) -> None:
    if SATURATES and mode == "interleave":
        pytest.skip("310P has the half mode only")
    x = numbers((2, 3, 5, 64), dtype)
    angles = numbers((1, 1, 5, 64), torch.float32, seed=1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    out = torch_npu.npu_rotary_mul(x.to("npu"), cos.to("npu"), sin.to("npu"), mode)
    assert_close(out, rotary(reference(x), reference(cos), reference(sin), mode), factor=4)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", ("half", "interleave"))
def test_npu_apply_rotary_pos_emb(mode: str, dtype: torch.dtype) -> None:
    query, key = numbers((2, 5, 3, 128), dtype), numbers((2, 5, 1, 128), dtype, seed=1)
    angles = numbers((2, 5, 1, 128), torch.float32, seed=2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    there = [t.to("npu") for t in (query, key, cos, sin)]
    for x, actual in zip((query, key), torch_npu.npu_apply_rotary_pos_emb(*there, "BSND", mode), strict=True):
        assert_close(actual, rotary(reference(x), reference(cos), reference(sin), mode), factor=4)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_embedding(dtype: torch.dtype) -> None:
    weight, index = numbers((10, 6), dtype), torch.tensor([[1, 9], [0, 1]])
    assert_close(F.embedding(index.to("npu"), weight.to("npu")), weight[index])


@pytest.mark.skipif(not SATURATES, reason="the other chips have infinity")
def test_overflow_saturates_and_raises_the_flag() -> None:
    torch_npu.npu.clear_npu_overflow_flag()
    x = torch.full((4,), 60000, dtype=torch.float16, device="npu")
    assert not torch_npu.npu.get_npu_overflow_flag()
    assert (x + x).tolist() == [65504.0] * 4
    assert torch_npu.npu.get_npu_overflow_flag()
    torch_npu.npu.clear_npu_overflow_flag()
    assert not torch_npu.npu.get_npu_overflow_flag()
    zero = torch.zeros(2, dtype=torch.float16, device="npu")
    assert (zero / zero).tolist() == [0.0, 0.0]  # where others have NaN


@pytest.mark.skipif(SATURATES, reason="310P saturates")
def test_overflow_is_infinity() -> None:
    x = torch.full((4,), 60000, dtype=torch.float16, device="npu")
    assert (x + x).tolist() == [float("inf")] * 4
