"""Activations, normalisations, resizing and the fused operators, against float32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torch_npu

from tests.on_npu.helpers import FLOATS, LAYOUTS, SATURATES, assert_close, numbers, on_npu, reference

Function = Callable[[torch.Tensor], torch.Tensor]

LAYERS: dict[str, Function] = {
    "silu": F.silu,
    "softmax": lambda x: F.softmax(x, dim=1),
    "layer norm": lambda x: F.layer_norm(x, (8,)),
    "group norm": lambda x: F.group_norm(x, 2),
    "nearest": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
    "nearest to size": lambda x: F.interpolate(x, size=(7, 11), mode="nearest"),
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


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", ("half", "interleave"))
def test_npu_rotary_mul(mode: str, dtype: torch.dtype) -> None:
    if SATURATES and mode == "interleave":
        pytest.skip("310P has the half mode only")
    x = numbers((2, 3, 5, 64), dtype)
    angles = numbers((1, 1, 5, 64), torch.float32, seed=1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    wide = reference(x)
    if mode == "half":
        left, right = wide.chunk(2, dim=-1)
        rotated = torch.cat([-right, left], dim=-1)
    else:
        rotated = torch.stack([-wide[..., 1::2], wide[..., ::2]], dim=-1).flatten(-2)
    out = torch_npu.npu_rotary_mul(x.to("npu"), cos.to("npu"), sin.to("npu"), mode)
    assert_close(out, wide * reference(cos) + rotated * reference(sin), factor=4)


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
