"""What each operator sends back, against float32 on the CPU."""

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

Function = Callable[..., torch.Tensor]

not_310p = pytest.mark.skipif(SATURATES, reason="310P has no kernel")


def assert_same_gradients(
    there: Function, here: Function, *inputs: torch.Tensor, factor: float = 8, every_layout: bool = False
) -> None:
    """Those of `there` on the NPU are those of `here` on the CPU in float32, for each of `inputs`."""
    leaves = [reference(x).clone().requires_grad_() for x in inputs]
    expected = here(*leaves)
    upstream = numbers(expected.shape, inputs[0].dtype, seed=99)
    wanted = torch.autograd.grad(expected, leaves, reference(upstream))
    for layout in LAYOUTS.values() if every_layout else [LAYOUTS["contiguous"]]:
        operands = [on_npu(x, layout).requires_grad_() for x in inputs]
        result = there(*operands)
        found = torch.autograd.grad(result, operands, on_npu(upstream, layout).to(result.dtype))
        for actual, gradient in zip(found, wanted, strict=True):
            assert_close(actual, gradient, factor=factor)


def assert_refused(function: Function, x: torch.Tensor, message: str = "no kernel for this chip") -> None:
    result = function(x.to("npu").requires_grad_())
    with pytest.raises(RuntimeError, match=message):
        result.sum().backward()


def fast_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def index(x: torch.Tensor, *values: int) -> torch.Tensor:
    return torch.tensor(values, device=x.device)


# ---- by name: the function, and the one that the CPU computes where it is another ----
Pair = tuple[Function, Function]
ACTIVATIONS: dict[str, Function | Pair] = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "leaky relu": lambda x: F.leaky_relu(x, 0.1),
    "gelu": (F.gelu, tanh_gelu),
    "npu_gelu": (lambda x: torch_npu.npu_gelu(x, approximate="none"), F.gelu),
    "npu_gelu tanh": (lambda x: torch_npu.npu_gelu(x, approximate="tanh"), tanh_gelu),
    "npu_fast_gelu": (torch_npu.npu_fast_gelu, fast_gelu),
    "glu": lambda x: F.glu(x, dim=1),
    "elu": lambda x: F.elu(x, 0.5),
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": lambda x: F.hardtanh(x, -1.5, 0.5),
    "relu6": F.relu6,
    "log sigmoid": F.logsigmoid,
    "mish": F.mish,
    "softshrink": lambda x: F.softshrink(x, 0.75),
    "logit": lambda x: torch.logit(x.sigmoid(), 0.1),
    "softmax": lambda x: x.softmax(1),
    "log softmax": lambda x: x.log_softmax(-1),
}
ACTIVATIONS_OF_910B: dict[str, Function] = {
    "silu": F.silu,
    "softplus": lambda x: F.softplus(x, 2.0, 1.5),
    "hardswish": F.hardswish,
    "hardshrink": lambda x: F.hardshrink(x, 0.75),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", (*ACTIVATIONS, *(pytest.param(n, marks=not_310p) for n in ACTIVATIONS_OF_910B)))
def test_activations(name: str, dtype: torch.dtype) -> None:
    found: Function | Pair = {**ACTIVATIONS, **ACTIVATIONS_OF_910B}[name]
    there, here = found if isinstance(found, tuple) else (found, found)
    assert_same_gradients(there, here, numbers((2, 6, 8), dtype), every_layout=True)


@not_310p
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_prelu(dtype: torch.dtype) -> None:
    for slopes in (1, 6):
        x, weight = numbers((2, 6, 8), dtype), numbers((slopes,), dtype, seed=1)
        assert_same_gradients(F.prelu, F.prelu, x, weight, factor=16)


def gated(activation: Function, activates_left: bool) -> Function:
    def unit(x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, dim=-1)
        return activation(left) * right if activates_left else left * activation(right)

    return unit


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("left", (False, True))
@pytest.mark.parametrize("approximate", (0, 1))
def test_npu_geglu(approximate: int, left: bool, dtype: torch.dtype) -> None:
    def geglu(x: torch.Tensor) -> torch.Tensor:
        return torch_npu.npu_geglu(x, dim=-1, approximate=approximate, activate_left=left)[0]

    x = numbers((3, 5, 16), dtype)
    if SATURATES and not approximate:
        assert_refused(geglu, x, "approximate must be 1")
    else:
        assert_same_gradients(geglu, gated(tanh_gelu if approximate else F.gelu, left), x)


@not_310p
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", ("half", "interleave"))
def test_npu_rotary_mul(mode: str, dtype: torch.dtype) -> None:
    x = numbers((2, 3, 5, 8), dtype)
    cos, sin = (numbers((1, 1, 5, 8), dtype, seed) for seed in (1, 2))

    def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        if mode == "half":
            left, right = x.chunk(2, dim=-1)
            return x * cos + torch.cat([-right, left], dim=-1) * sin
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        return x * cos + turned * sin

    def there(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return torch_npu.npu_rotary_mul(x, cos, sin, mode)

    assert_same_gradients(there, rotated, x, cos, sin, factor=16)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_npu_swiglu(dtype: torch.dtype) -> None:
    x = numbers((3, 5, 64), dtype)
    assert_same_gradients(lambda x: torch_npu.npu_swiglu(x, dim=-1), gated(F.silu, True), x)


@not_310p
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_group_norm(dtype: torch.dtype) -> None:
    x, weight, bias = numbers((2, 6, 4, 5), dtype), numbers((6,), dtype, seed=1), numbers((6,), dtype, seed=2)

    def normed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, 3, weight, bias, 1e-3)

    assert_same_gradients(normed, normed, x, weight, bias, factor=16)
    assert_same_gradients(lambda x: F.group_norm(x, 2), lambda x: F.group_norm(x, 2), x, factor=16)


@not_310p
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_npu_group_norm_swish(dtype: torch.dtype) -> None:
    x, weight, bias = numbers((2, 6, 4, 5), dtype), numbers((6,), dtype, seed=1), numbers((6,), dtype, seed=2)

    def there(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch_npu.npu_group_norm_swish(x, 3, weight, bias, eps=1e-3, swish_scale=0.5)[0]

    def here(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        y = F.group_norm(x, 3, weight, bias, 1e-3)
        return y * torch.sigmoid(0.5 * y)

    assert_same_gradients(there, here, x, weight, bias, factor=24)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_layer_norm(dtype: torch.dtype) -> None:
    x, weight, bias = numbers((2, 4, 3, 6), dtype), numbers((3, 6), dtype, seed=1), numbers((3, 6), dtype, seed=2)

    def normed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (3, 6), weight, bias, 1e-3)

    assert_same_gradients(normed, normed, x, weight, bias, factor=16)
    assert_same_gradients(lambda x: F.layer_norm(x, (6,)), lambda x: F.layer_norm(x, (6,)), x, factor=16)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_npu_rms_norm(dtype: torch.dtype) -> None:
    x, gamma = numbers((3, 5, 32), dtype), numbers((32,), dtype, seed=1)
    assert_same_gradients(
        lambda x, gamma: torch_npu.npu_rms_norm(x, gamma, epsilon=1e-3)[0],
        lambda x, gamma: F.rms_norm(x, (32,), gamma, 1e-3),
        *(x, gamma),
        factor=16,
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_npu_add_layer_norm(dtype: torch.dtype) -> None:
    x, y = numbers((3, 5, 32), dtype), numbers((3, 5, 32), dtype, seed=1)
    gamma, beta = numbers((32,), dtype, seed=2), numbers((32,), dtype, seed=3)

    def there(*operands: torch.Tensor) -> torch.Tensor:
        normed, _, _, total = torch_npu.npu_add_layer_norm(*operands, epsilon=1e-3, additional_output=True)
        return normed + total

    def here(x: torch.Tensor, y: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x + y, (32,), gamma, beta, 1e-3) + x + y

    assert_same_gradients(there, here, x, y, gamma, beta, factor=16)


@not_310p
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("training", (False, True))
def test_batch_norm(training: bool, dtype: torch.dtype) -> None:
    x, weight, bias = numbers((3, 4, 5), dtype), numbers((4,), dtype, seed=1), numbers((4,), dtype, seed=2)

    def normed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        mean, variance = x.new_full((4,), 0.25).float(), x.new_full((4,), 2).float()
        return F.batch_norm(x, mean, variance, weight.float(), bias.float(), training, 0.1, 1e-3)

    assert_same_gradients(normed, normed, x, weight, bias, factor=16)


def convolved(stride: int, padding: int, dilation: int, groups: int) -> Function:
    arguments = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return lambda x, weight, bias: F.conv2d(x, weight, bias, **arguments)


# 310P rounds float32 operands to float16, and 910B to HF32, as its default asks for.
def factor_of_products(dtype: torch.dtype) -> float:
    return 16 if dtype != torch.float32 else 8000


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("stride, padding, dilation, groups", [(1, 1, 1, 1), (2, 0, 1, 1), (1, 2, 2, 1), (1, 1, 1, 2)])
@pytest.mark.parametrize("kernel", (1, 3))
def test_convolutions(kernel: int, stride: int, padding: int, dilation: int, groups: int, dtype: torch.dtype) -> None:
    x, weight = numbers((2, 4, 9, 8), dtype), numbers((6, 4 // groups, kernel, kernel), dtype, seed=1, low=-1, high=1)
    function = convolved(stride, padding, dilation, groups)
    assert_same_gradients(
        function, function, x, weight, numbers((6,), dtype, seed=2), factor=factor_of_products(dtype)
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_transposed_and_one_dimensional_convolutions(dtype: torch.dtype) -> None:
    x, weight, bias = numbers((2, 4, 5, 6), dtype), numbers((4, 3, 3, 3), dtype, seed=1), numbers((3,), dtype, seed=2)

    def transposed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.conv_transpose2d(x, weight, bias, stride=2, padding=1)

    assert_same_gradients(transposed, transposed, x, weight, bias, factor=factor_of_products(dtype))
    x, weight = numbers((2, 4, 11), dtype), numbers((6, 4, 3), dtype, seed=1)
    assert_same_gradients(F.conv1d, F.conv1d, x, weight, factor=factor_of_products(dtype))


RESIZINGS: dict[str, Function] = {
    "nearest": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
    "nearest to size": lambda x: F.interpolate(x, size=(7, 11), mode="nearest"),
    "bilinear": lambda x: F.interpolate(x, size=(7, 11), mode="bilinear"),
    "bilinear aligned": lambda x: F.interpolate(x, size=(7, 11), mode="bilinear", align_corners=True),
    "average pool": lambda x: F.avg_pool2d(x, 2),
    "adaptive average pool": lambda x: F.adaptive_avg_pool2d(x, (3, 5)),
    "pad by reflection 1d": lambda x: F.pad(x[0], (3, 2), mode="reflect"),
    "pad by reflection 2d": lambda x: F.pad(x, (3, 2, 1, 4), mode="reflect"),
    "pad by reflection 3d": lambda x: F.pad(x, (3, 2, 1, 4, 1, 2), mode="reflect"),
    "pad by replication 1d": lambda x: F.pad(x[0], (3, 2), mode="replicate"),
    "pad by replication 2d": lambda x: F.pad(x, (3, 2, 1, 4), mode="replicate"),
    "pad by replication 3d": lambda x: F.pad(x, (3, 2, 1, 4, 1, 2), mode="replicate"),
    "average pool with padding": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
}
RESIZINGS_OF_910B: dict[str, Function] = {
    "bicubic": lambda x: F.interpolate(x, scale_factor=2.0, mode="bicubic"),
    "max pool": lambda x: F.max_pool2d(x, 2),
    "max pool with padding": lambda x: F.max_pool2d(x, 3, 2, 1, dilation=2),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", (*RESIZINGS, *(pytest.param(n, marks=not_310p) for n in RESIZINGS_OF_910B)))
def test_resizing(name: str, dtype: torch.dtype) -> None:
    function = {**RESIZINGS, **RESIZINGS_OF_910B}[name]
    x = numbers((2, 4, 6, 8), dtype)
    if SATURATES and name.startswith("nearest") and dtype != torch.float16:
        assert_refused(function, x, "must be float16")
    else:
        assert_same_gradients(function, function, x, every_layout=True)


COMPATIBLE = """
import torch, torch_npu
import torch.nn.functional as F
torch.npu.set_compile_mode(jit_compile=False)
torch.npu.use_compatible_impl(True)
x = torch.arange(128.0).cos().view(2, 1, 8, 8)
for function in (lambda x: F.max_pool2d(x, 3, 2, 1), F.gelu, lambda x: F.gelu(x, approximate="tanh")):
    here, there = x.clone().requires_grad_(), x.npu().requires_grad_()
    for leaf in (here, there):
        function(leaf).square().sum().backward()
    torch.testing.assert_close(there.grad.cpu(), here.grad)
"""


@not_310p
def test_gradients_of_the_compatible_implementation() -> None:
    subprocess.run([sys.executable, "-c", COMPATIBLE], check=True)  # torch_npu asks once in a process


MOVES: dict[str, Function] = {
    "slice": lambda x: x[1:, ::2] * 2,
    "select": lambda x: x[1] * 2,
    "transpose": lambda x: x.transpose(0, 1).contiguous(),
    "reshape": lambda x: x.transpose(0, 1).reshape(-1),
    "flip": lambda x: x.flip(0, 2),
    "roll": lambda x: x.roll((1, 2), (0, 1)),
    "repeat": lambda x: x.repeat(2, 1, 3),
    "expand": lambda x: x[:, :1].expand(3, 4, 6) * 2,
    "cat": lambda x: torch.cat([x, 2 * x], dim=1),
    "stack": lambda x: torch.stack([x, 2 * x], dim=-1),
    "chunk": lambda x: torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1),
    "split": lambda x: torch.cat(x.split(3, dim=1)[::-1], dim=1),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1), value=7),
    "tril": lambda x: x.tril(1),
    "index": lambda x: x[index(x, 2, 0, 1, 2)],
    "index two": lambda x: x[index(x, 2, 0, 2), index(x, 1, 3, 1)],
    "index select": lambda x: x.index_select(1, index(x, 3, 0, 3)),
    "gather": lambda x: x.gather(1, index(x, 3, 3).view(1, 2, 1).expand(3, 2, 6)),
    "scatter": lambda x: x.scatter(1, index(x, 3, 0).view(1, 2, 1).expand(3, 2, 6), x[:, 2:] * 2),
    "scatter add": lambda x: x.scatter_add(1, index(x, 3, 3).view(1, 2, 1).expand(3, 2, 6), x[:, 2:] * 2),
    "put": lambda x: (x * 1).index_put_((index(x, 0, 2),), x[:2] * 3),
    "put accumulate": lambda x: (x * 1).index_put_((index(x, 0, 0),), x[:2] * 3, accumulate=True),
    "index add": lambda x: x.index_add(1, index(x, 1, 1), x[:, :2] * 2),
    "masked fill": lambda x: x.masked_fill(x > 1, 5),
    "masked select": lambda x: x.masked_select(x > 0),
    "where": lambda x: torch.where(x > 0, 2 * x, x * x),
    "unfold": lambda x: x.unfold(2, 3, 2) * 2,
    "sort": lambda x: x.sort(-1)[0],
    "topk": lambda x: x.topk(3, dim=-1)[0],
    "amax": lambda x: x.amax(-1),
    "max dim": lambda x: x.max(1)[0],
    "sum": lambda x: x.sum((0, 2), keepdim=True),
    "mean": lambda x: x.mean(-1),
    "var": lambda x: x.var(-1),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=-1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "cumsum": lambda x: x.cumsum(1),
    "prod": lambda x: x.prod(1),
    "clamp": lambda x: x.clamp(-1, 1.5),
    "exp": torch.exp,
    "abs": torch.abs,
    "square": torch.square,
    "pow": lambda x: x.pow(3),
    "sqrt": lambda x: x.abs().add(1).sqrt(),
    "rsqrt": lambda x: x.abs().add(1).rsqrt(),
    "log": lambda x: x.abs().add(1).log(),
    "sin": torch.sin,
    "cos": torch.cos,
    "erf": torch.erf,
    "reciprocal": lambda x: 1 / (x.abs() + 1),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", MOVES)
def test_moves_reductions_and_arithmetic(name: str, dtype: torch.dtype) -> None:
    assert_same_gradients(MOVES[name], MOVES[name], numbers((3, 4, 6), dtype), factor=16)


@not_310p
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("padding", (None, 3))
def test_embedding(padding: int | None, dtype: torch.dtype) -> None:
    def embedded(weight: torch.Tensor) -> torch.Tensor:
        return F.embedding(index(weight, 3, 0, 3, 3, 8).view(1, 5), weight, padding_idx=padding)

    assert_same_gradients(embedded, embedded, numbers((9, 6), dtype))


PRODUCTS: dict[str, tuple[Function, tuple[int, ...], tuple[int, ...]]] = {
    "mm": (torch.mm, (5, 7), (7, 3)),
    "matmul of batches": (torch.matmul, (2, 1, 5, 7), (3, 7, 4)),
    "bmm": (torch.bmm, (4, 5, 7), (4, 7, 3)),
    "linear": (F.linear, (2, 5, 7), (3, 7)),
    "linear with bias": (lambda x, y: F.linear(x, y, y[:, 0]), (2, 5, 7), (3, 7)),
    "addmm": (lambda x, y: torch.addmm(x[:, :3], x, y, beta=0.5, alpha=2), (5, 7), (7, 3)),
    "baddbmm": (lambda x, y: torch.baddbmm(x[:, :, :3], x, y, beta=0.5, alpha=2), (4, 5, 7), (4, 7, 3)),
    "mv": (torch.mv, (5, 7), (7,)),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str, dtype: torch.dtype) -> None:
    function, left, right = PRODUCTS[name]
    x, y = numbers(left, dtype, low=-1, high=1), numbers(right, dtype, seed=1, low=-1, high=1)
    factor = 16 if dtype != torch.float32 or not SATURATES else 4000  # 310P rounds float32 operands to float16
    assert_same_gradients(function, function, x, y, factor=factor)


REFUSED: dict[str, Function] = {
    **ACTIVATIONS_OF_910B,
    **RESIZINGS_OF_910B,
    "prelu": lambda x: F.prelu(x, x.new_ones(1)),
    "group norm": lambda x: F.group_norm(x, 2),
    "batch norm": lambda x: F.batch_norm(x, None, None, training=True),
    "cross entropy": lambda x: F.cross_entropy(x.flatten(1), index(x, 3, 8)),
    "kl div": lambda x: F.kl_div(x.log_softmax(1), x.detach().softmax(1), reduction="batchmean"),
    "soft margin": lambda x: F.soft_margin_loss(x, x.detach().sign()),
}


@pytest.mark.skipif(not SATURATES, reason="of 310P")
@pytest.mark.parametrize("name", REFUSED)
def test_what_310p_refuses(name: str) -> None:
    """What its operators' pages do not list for it: it computes the result, and sends nothing back."""
    assert_refused(REFUSED[name], numbers((2, 4, 6, 8), torch.float32))


@pytest.mark.skipif(not SATURATES, reason="of 310P")
def test_310p_sends_nothing_back_to_an_embedding() -> None:
    assert_refused(lambda weight: F.embedding(index(weight, 3, 0), weight), numbers((9, 6), torch.float32))
