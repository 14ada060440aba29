"""Weights of 8 bits on a chip: its operator against float32 on the CPU, what it refuses, and layers that call it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_npu
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ascend.graphs.compile import compile_module, decompile_module
from processors import dequantize_weights, enable_fused_kernels, enable_token_merging, quantize_weights
from processors.kernels.quantized import QuantizedLinear, linear, quantize
from tests.on_npu.helpers import FLOATS, SATURATES, TOLERANCES, assert_close
from tests.on_npu.inputs import numbers
from tests.programs import environment
from tests.tiny_models import small_unet, tiny_unet

HALVES = [dtype for dtype in FLOATS if dtype != torch.float32]
HALF = HALVES[-1]
FRACTAL_NZ = 29
OPERATOR = torch.ops.npu.npu_weight_quant_batchmatmul.default


class Recorder(TorchDispatchMode):
    """Counts the calls of the operator."""

    calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += function is OPERATOR
        return function(*args, **(kwargs or {}))


def integers(shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)


def scales(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return numbers(shape, dtype, seed=4, low=0.001, high=0.003)


def bias_of(size: int, dtype: torch.dtype) -> torch.Tensor:
    return numbers((size,), torch.float32 if dtype == torch.bfloat16 else dtype, seed=5)


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    group: int = 0,
) -> torch.Tensor:
    """In float32, of a weight that was rounded to the dtype of x, as the matrix unit reads it."""
    spread = [t if t is None or not group else t.repeat_interleave(group, 0) for t in (scale, offset)]
    exact = weight.float() if offset is None else weight.float() + spread[1].float()
    result = x.float() @ (exact * spread[0].float()).to(x.dtype).float()
    return result if bias is None else result + bias.float()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("scale_shape", ((24,), (1, 24), (1,), (1, 1), (2, 24)), ids=str)
@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("with_offset, with_bias, precise", ((False, True, 0), (True, False, 0), (True, True, 1)))
def test_the_operator_against_float32(
    with_offset: bool,
    with_bias: bool,
    precise: int,
    transposed: bool,
    scale_shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    group = 32 if scale_shape[0] == 2 else 0
    x, scale = numbers((5, 64), dtype), scales(scale_shape, dtype)
    weight = integers((24, 64)).t() if transposed else integers((64, 24))
    offset = numbers(scale_shape, dtype, seed=6) if with_offset else None
    bias = bias_of(24, dtype) if with_bias else None
    there = weight.t().contiguous().to("npu").t() if transposed else weight.to("npu")
    out = torch_npu.npu_weight_quant_batchmatmul(
        x.to("npu"),
        there,
        scale.to("npu"),
        antiquant_offset=None if offset is None else offset.to("npu"),
        bias=None if bias is None else bias.to("npu"),
        antiquant_group_size=group,
        inner_precise=precise,
    )
    assert out.dtype == dtype
    assert_close(out, product(x, weight, scale, offset, bias, group), factor=4)


REFUSED_310P = {
    "bfloat16": ({"dtype": torch.bfloat16}, "bfloat16, which Ascend310P3 does not have"),
    "float32": ({"dtype": torch.float32}, "must be float16"),
    "a bias of float32": ({"bias": torch.zeros(24)}, "bias and the result must be float16"),
    "a weight of int32": ({"weight": torch.zeros(64, 24, dtype=torch.int32)}, "the weight must be int8"),
    "a quantised result": ({"quant_scale": torch.ones(24, dtype=torch.int64)}, "quant_scale and quant_offset"),
}
REFUSED_910B = {
    "float32": ({"dtype": torch.float32}, "x must be float16 or bfloat16"),
    "a weight of float16": ({"weight": torch.zeros(64, 24).half()}, "the weight must be int8"),
    "a bias of bfloat16": ({"dtype": torch.bfloat16, "bias": torch.zeros(24).bfloat16()}, "the bias must be float16"),
    "a bias of float32 for float16": ({"bias": torch.zeros(24)}, "the bias must be float16"),
    "a scale of float32": ({"scale": torch.ones(24)}, "antiquant_scale must be"),
    "batches": ({"x": torch.zeros(2, 5, 64).half()}, "at most 2 dimensions"),
}
REFUSED_BOTH = {
    "too many channels": ({"weight": torch.zeros(64, 65536, dtype=torch.int8), "scale": torch.ones(65536)}, "65535"),
    "nothing": ({"x": torch.zeros(0, 64).half()}, "empty"),
    "activations with gaps": ({"x": torch.zeros(5, 128).half(), "step": 2}, "contiguous, or transposed"),
}
REFUSED = {**(REFUSED_310P if SATURATES else REFUSED_910B), **REFUSED_BOTH}
if not SATURATES:
    REFUSED["a scale of another dtype"] = ({"scale": torch.ones(24).bfloat16()}, "have the dtype of x")


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_chip_refuses(name: str) -> None:
    case, message = REFUSED[name]
    dtype = case.get("dtype", torch.float16)
    x = case.get("x", torch.zeros(5, 64, dtype=dtype)).to("npu")[..., :: case.get("step", 1)]
    weight = case.get("weight", torch.zeros(64, 24, dtype=torch.int8))
    scale = case.get("scale", torch.ones(24))
    scale = scale if name.startswith("a scale") else scale.to(dtype)
    options = {key: case[key].to("npu") for key in ("bias", "quant_scale") if key in case}
    with pytest.raises(RuntimeError, match=message):
        torch_npu.npu_weight_quant_batchmatmul(x, weight.to("npu"), scale.to("npu"), **options)


def test_a_private_format_is_for_graphs_alone(npu: torch.device) -> None:
    torch.npu.config.allow_internal_format = True
    try:
        weight = torch_npu.npu_format_cast(integers((64, 64)).to(npu), FRACTAL_NZ)
    finally:
        torch.npu.config.allow_internal_format = False
    assert torch_npu.get_npu_format(weight) == FRACTAL_NZ
    x, scale = torch.zeros(5, 64, dtype=torch.float16), torch.ones(64, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="FRACTAL_NZ is taken in graphs only"):
        torch_npu.npu_weight_quant_batchmatmul(x.to(npu), weight, scale.to(npu))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", ((64,), (5, 64), (2, 3, 64), (2, 0, 64)), ids=str)
@pytest.mark.parametrize("with_bias", (False, True))
def test_a_layer_calls_the_operator_where_it_may(with_bias: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, scale = numbers(shape, dtype), integers((24, 64)), scales((24,), dtype)
    bias = numbers((24,), dtype, seed=5) if with_bias else None
    there = [None if tensor is None else tensor.to("npu") for tensor in (x, weight, scale, bias)]
    with torch.no_grad(), Recorder() as recorder:
        out = linear(*there)
    assert recorder.calls == (dtype in HALVES and x.numel() > 0)
    # 310P computes float32 products in float16.
    assert_close(out, product(x, weight.t(), scale, None, bias), factor=4 if dtype in HALVES else 2000)


def test_a_gradient_passes_by_the_operator(npu: torch.device) -> None:
    layer = nn.Linear(64, 24).to(npu, HALF)
    quantize(layer)
    x = numbers((5, 64), HALF).to(npu).requires_grad_()
    with Recorder() as recorder:
        out = layer(x)
        out.sum().backward()
    assert not recorder.calls
    assert_close(
        x.grad, (layer.weight.cpu().float() * layer.scale.cpu().float().unsqueeze(1)).sum(0).expand(5, -1), 64
    )


def inputs(device: torch.device, dtype: torch.dtype = HALF) -> tuple[torch.Tensor, ...]:
    latents, text = numbers((2, 4, 16, 16), dtype), numbers((2, 7, 32), dtype, 1)
    return latents.to(device), torch.tensor([10, 500], device=device), text.to(device)


@torch.no_grad()
def test_a_unet_computes_what_it_does_on_the_cpu_from_less_memory(npu: torch.device) -> None:
    unet = tiny_unet().eval().to(HALF)
    quantize_weights(unet)
    layers = sum(isinstance(module, QuantizedLinear) for module in unet.modules())
    expected = unet.float()(*inputs(torch.device("cpu"), torch.float32)).sample
    before = torch.npu.memory_allocated()
    unet = unet.to(HALF).to(npu)
    held = torch.npu.memory_allocated() - before
    enable_fused_kernels(unet)
    enable_token_merging(unet)
    enable_token_merging(unet, ratio=0.0)
    with Recorder() as recorder:
        actual = unet(*inputs(npu)).sample
    assert recorder.calls == layers
    assert (actual.cpu().float() - expected).norm() < 16 * TOLERANCES[HALF] * expected.norm()
    dequantize_weights(unet)
    assert torch.npu.memory_allocated() - before > held
    again = unet(*inputs(npu)).sample
    assert (again - actual).norm() < 16 * TOLERANCES[HALF] * expected.norm()


@pytest.fixture
def fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.npu.config.allow_internal_format = False


@pytest.mark.filterwarnings("ignore")  # torchair warns that frozen parameters must stay where they are
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@torch.no_grad()
def test_a_compiled_unet_is_one_graph_before_and_after(
    npu: torch.device, fresh_graphs: None, tmp_path: Path, dtype: torch.dtype
) -> None:
    """Quantised after compiling, it is compiled anew; decompiled, its weights are in the plain format again."""
    unet = small_unet().eval().to(npu, dtype)
    compile_module(unet, tmp_path)
    float_weights = unet(*inputs(npu, dtype)).sample
    quantize_weights(unet)
    graph = unet(*inputs(npu, dtype)).sample
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]
    formats = {torch_npu.get_npu_format(m.weight) for m in unet.modules() if isinstance(m, QuantizedLinear)}
    assert formats == {FRACTAL_NZ}
    decompile_module(unet)
    with Recorder() as recorder:
        eager = unet(*inputs(npu, dtype)).sample
    assert recorder.calls
    assert (graph - eager).norm() < 16 * TOLERANCES[dtype] * eager.norm()
    assert 0 < (eager - float_weights).norm() < 0.05 * eager.norm()


@pytest.mark.skipif(not os.environ.get("CANN_EMULATOR_SOC"), reason="the trace is the emulator's")
def test_a_graph_reads_integers_in_the_format_of_the_matrix_unit(npu: torch.device, tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import torch
        from pathlib import Path
        from torch import nn
        from ascend.device import DeviceManager
        from ascend.graphs.compile import compile_module
        from processors import quantize_weights

        device = DeviceManager("npu").device
        model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).eval().to(device, {dtype})
        quantize_weights(model)
        compile_module(model, Path({cache!r}))
        with torch.no_grad():
            model(torch.ones(5, 64, dtype={dtype}, device=device))
        """
    ).format(cache=str(tmp_path / "graphs"), dtype=HALF)
    script, trace = tmp_path / "model.py", tmp_path / "trace.jsonl"
    script.write_text(program)
    subprocess.run([sys.executable, script], check=True, env=environment(CANN_EMULATOR_TRACE=str(trace)))
    events = [json.loads(line) for line in trace.read_text().splitlines()]
    launches = [event for event in events if event["event"] == "launch" and "graph" in event]
    products = [event for event in launches if event["operator"] == "WeightQuantBatchMatmulV2"]
    assert [event["flops"] for event in products] == [2 * 5 * 64 * 96] * 2
    read = [(tensor["dtype"], tensor["format"]) for event in products for tensor in event["tensors"][1:2]]
    assert read == [("int8", "FRACTAL_NZ")] * 2
    assert not {"TransData", "Transpose", "Mul"} & {event["operator"] for event in launches}
