"""Graphs: what torchair compiles with the GE backend, against the same call in eager mode and on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_npu
from diffusers.utils import BaseOutput
from torch import nn
from torch.utils._pytree import SUPPORTED_NODES, tree_leaves

from ascend.graphs.compile import compile_module
from ascend.graphs.torchair import make_config
from processors.merging import npu_tome, tome
from processors.merging.tome import count_merged, match, partition
from tests.on_npu.helpers import FLOATS, SATURATES, TOLERANCES, reference
from tests.on_npu.inputs import numbers
from tests.programs import environment
from tests.tiny_models import tiny_unet

FRACTAL_NZ = 29
HALF = torch.float16 if SATURATES else torch.bfloat16


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchair warns that frozen parameters must stay where they are
        yield
    torch.npu.config.allow_internal_format = False


def compiled(function: Callable[..., Any], config: Any = None) -> Callable[..., Any]:
    import torchair

    backend = torchair.get_npu_backend(compiler_config=config)
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)


def close(actual: torch.Tensor, expected: torch.Tensor, factor: float = 1) -> None:
    """Within `factor` units in the last place of `actual`'s dtype, of the larger of 1 and the value."""
    result = actual.cpu()
    assert result.shape == expected.shape
    if not result.is_floating_point():
        assert torch.equal(result, expected.to(result.dtype))
        return
    limit = factor * TOLERANCES[result.dtype] * expected.double().abs().clamp_min(1)
    assert ((result.double() - expected.double()).abs() <= limit).all()


X, Y, Z = (3, 4, 8), (3, 4, 8), (8, 5)
# Name: function, shapes of the operands, units in the last place.
ROWS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], float]] = {
    "arithmetic": (lambda x, y: x * 2 + y - x / (y.abs() + 1), [X, Y], 8),
    "broadcasting": (lambda x, y: x + y[:, :1] * 0.5, [X, Y], 2),
    "addcmul": (lambda x, y: torch.addcmul(x, x, y, value=0.5), [X, Y], 8),
    "powers": (lambda x: torch.sqrt(x * x + 1) + torch.rsqrt(x * x + 1) + x**2, [X], 16),
    "rsub": (lambda x: torch.rsub(x, 2.0, alpha=0.5), [X], 4),
    "functions": (lambda x: torch.sin(x) + torch.cos(x) + torch.exp(-x * x) + torch.tanh(x), [X], 8),
    "activations": (lambda x: F.silu(x) + F.relu(x) + torch.sigmoid(x), [X], 8),
    "threshold": (lambda x: F.threshold(x, 0.5, 20.0), [X], 1),
    "extremes": (lambda x, y: torch.maximum(x, y).clamp(-1, 1) + torch.minimum(x, y), [X, Y], 4),
    "comparisons": (lambda x, y: (x > y) & (x <= 1) | ~(y >= 0), [X, Y], 1),
    "where": (lambda x, y: torch.where(x > 0, x, y).masked_fill(y > 1, 0.0), [X, Y], 1),
    "sums": (lambda x: x.sum(-1) + x.mean(dim=(0, 2)).sum(), [X], 32),
    "reduced_extremes": (lambda x: (x.max(), x.max(dim=1), x.argmax(-1)), [X], 1),
    "norms": (lambda x: torch.linalg.vector_norm(x, dim=-1), [X], 4),
    "deviations": (lambda x: (x.std(1), x.std(dim=(0, 2), correction=0, keepdim=True)), [X], 8),
    "mse_loss": (lambda x, y: [F.mse_loss(x, y, reduction=r) for r in ("none", "mean", "sum")], [X, Y], 16),
    "cumsum": (lambda x: x.cumsum(1), [X], 8),
    "sort": (lambda x: x.sort(-1, descending=True), [X], 1),
    "topk": (lambda x: x.topk(3, dim=-1), [X], 1),
    "searchsorted": (lambda x, y: torch.searchsorted(x.float().sort(-1).values, y.float(), right=True), [X, Y], 1),
    "views": (lambda x: x.reshape(12, 8).t().unsqueeze(0).squeeze(0).flatten() * 1, [X], 1),
    "permute": (lambda x: x.permute(2, 0, 1).contiguous(), [X], 1),
    "cat": (lambda x, y: torch.cat([x, y, x], dim=1), [X, Y], 1),
    "stack": (lambda x, y: torch.stack([x, y], dim=-1), [X, Y], 1),
    "chunks": (lambda x: [part * 2 for part in x.chunk(2, -1)], [X], 1),
    "split": (lambda x: [part + 1 for part in x.split([1, 3], dim=1)], [X], 1),
    "slices": (lambda x: x[:, 1:3, ::2] + x[:, :2, 1::2], [X], 2),
    "select": (lambda x: x[:, -1] + x[0, 0], [X], 2),
    "select_scatter": (lambda x, y: torch.select_scatter(x, y[:, 0], 1, -1), [X, Y], 1),
    "as_strided_scatter": (lambda x, y: torch.as_strided_scatter(x, y[0, :2, :2], (2, 2), (32, 3), 5), [X, Y], 1),
    "expand": (lambda x: x[:, :1].expand(-1, 4, -1) + 1, [X], 2),
    "repeat": (lambda x: x.repeat(2, 1, 3), [X], 1),
    "flip": (lambda x: x.flip(-1), [X], 1),
    "reflection_pad": (lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect"), [(2, 3, 4, 5)], 1),
    "replication_pad": (lambda x: F.pad(x, (2, 3), mode="replicate"), [X], 1),
    "foreach": (lambda x, y: torch._foreach_mul(torch._foreach_add([x, y], [0.5, -1.0]), [y, x]), [X, Y], 8),
    "foreach_unary": (lambda x, y: torch._foreach_tanh([x, y]) + torch._foreach_floor([x, y]), [X, Z], 2),
    "foreach_of_three": (lambda x, y: torch._foreach_addcmul([x, y], [y, x], [x, x], 0.5), [X, Y], 8),
    "constants": (lambda x: x + torch.arange(8, device=x.device).to(x.dtype) + torch.ones_like(x), [X], 4),
    "softmax": (lambda x: x.softmax(-1), [X], 4),
    "layer_norm": (lambda x: F.layer_norm(x, (8,)), [X], 8),
    "group_norm": (lambda x: F.group_norm(x, 2), [(2, 4, 3, 5)], 8),
    "upsample": (lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"), [(2, 4, 3, 5)], 1),
    "avg_pool": (lambda x: F.avg_pool2d(x, 2), [(2, 4, 6, 4)], 2),
    "adaptive_avg_pool": (lambda x: torch.ops.aten._adaptive_avg_pool2d(x, (2, 3)), [(2, 4, 6, 5)], 2),
    "grid_sample": (
        lambda x, grid: F.grid_sample(x.float(), grid.float(), "bicubic", "reflection", align_corners=True),
        [(2, 3, 5, 4), (2, 3, 4, 2)],
        64,
    ),
    "grid_sample_3d": (
        lambda x, grid: F.grid_sample(x.float(), grid.float(), align_corners=False),
        [(2, 3, 5, 4, 3), (2, 3, 4, 2, 3)],
        64,
    ),
    "convolution": (lambda x, w: F.conv2d(x, w, padding=1), [(2, 4, 6, 5), (3, 4, 3, 3)], 64),
    "strided_convolution": (lambda x, w: F.conv2d(x, w, stride=2, padding=1), [(2, 4, 6, 5), (3, 4, 3, 3)], 64),
    "convolution_3d": (lambda x, w: F.conv3d(x, w, padding=1), [(1, 2, 3, 4, 5), (3, 2, 3, 3, 3)], 64),
    "transposed_convolution_3d": (
        lambda x, w: F.conv_transpose3d(x, w, stride=2, output_padding=1),
        [(1, 2, 2, 3, 2), (2, 3, 2, 3, 2)],
        64,
    ),
    "product": (lambda x, y: x @ y, [X, Z], 64),
    "batched_product": (lambda x, y: torch.bmm(x, y.transpose(1, 2)), [X, Y], 64),
    "baddbmm": (lambda x, y: torch.baddbmm(x[:, :, :4], x, y.transpose(1, 2), alpha=0.5), [X, Y], 64),
    "linear": (lambda x, w: F.linear(x, w, w[:, 0]), [X, (5, 8)], 64),
}


LISTS = {"foreach", "foreach_unary", "foreach_of_three"}  # 310P has no operators on lists of tensors


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", [name for name in ROWS if not (SATURATES and name in LISTS)])
def test_a_graph_computes_what_the_cpu_does(npu: torch.device, name: str, dtype: torch.dtype) -> None:
    function, shapes, factor = ROWS[name]
    if dtype == torch.float32 and ("product" in name or "bmm" in name or "linear" in name or "conv" in name):
        factor *= 2**13 if SATURATES else 2**12  # the matrix units round float32 to 10 bits
    inputs = [numbers(shape, dtype, seed) for seed, shape in enumerate(shapes)]
    actual = compiled(function)(*(x.to(npu) for x in inputs))
    expected = function(*(reference(x) for x in inputs))
    for result, truth in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        close(result, truth, factor)


def test_indices(npu: torch.device) -> None:
    def function(table: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        picked = table[rows]
        order = picked.argmax(-1, keepdim=True)
        return (
            F.embedding(rows, table),
            table.index_select(0, rows),
            picked.gather(1, order),
            table.scatter(0, rows.unsqueeze(1), picked * 2),
        )

    table, rows = numbers((6, 5), HALF), torch.tensor([4, 1, 3])
    for result, truth in zip(compiled(function)(table.to(npu), rows.to(npu)), function(table, rows), strict=True):
        close(result, truth)


def test_gelu_is_the_tanh_form(npu: torch.device) -> None:
    x = numbers((4, 33), HALF)
    close(compiled(F.gelu)(x.to(npu)), F.gelu(x.float(), approximate="tanh"), 2)


@pytest.mark.skipif(SATURATES, reason="310P has no operators on lists of tensors")
def test_lists_are_rounded_away_from_zero(npu: torch.device) -> None:
    """torch rounds halves to the even number, and so does the chip outside of lists."""

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return *torch._foreach_round([x, x + 1]), torch.round(x)

    x = torch.tensor([0.5, -0.5, 2.5, 2.4, -2.6])
    first, second, single = compiled(function)(x.to(npu))
    assert first.tolist() == [1, -1, 3, 2, -3]
    assert second.tolist() == [2, 1, 4, 3, -2]
    assert single.tolist() == [0, 0, 2, 2, -3]


def test_fused_layers(npu: torch.device) -> None:
    def function(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            torch_npu.npu_geglu(x, dim=-1, approximate=1)[0],
            torch_npu.npu_swiglu(x, dim=-1),
            torch_npu.npu_rms_norm(x, weight)[0],
            *torch_npu.npu_add_rms_norm(x, x * 0.3, weight)[::2],
        )

    x, weight = numbers((4, 64), HALF).to(npu), numbers((64,), HALF).to(npu)
    for result, eager in zip(compiled(function)(x, weight), function(x, weight), strict=True):
        close(result, eager.cpu())


def test_attention_of_the_chip(npu: torch.device) -> None:
    q, k, v = (numbers((2, 32, 64), HALF, seed).to(npu) for seed in range(3))

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        call = {"num_heads": 4, "input_layout": "BSH"}
        if SATURATES:
            return torch_npu.npu_prompt_flash_attention(q, k, v, scale_value=0.25, next_tokens=65535, **call)
        return torch_npu.npu_fused_infer_attention_score(q, k, v, scale=0.25, **call)[0]

    close(compiled(function)(q, k, v), function(q, k, v).cpu(), 1)


def test_what_the_chip_refuses_names_operator_and_fx_node(npu: torch.device) -> None:
    """310P has no npu_fused_infer_attention_score, and neither chip attends to float32."""
    q = numbers((1, 32, 64), torch.float32).to(npu)

    def function(q: torch.Tensor) -> torch.Tensor:
        return torch_npu.npu_fused_infer_attention_score(q, q, q, num_heads=4, scale=0.25, input_layout="BSH")[0]

    with pytest.raises(Exception, match="GE operator FusedInferAttentionScore .*npu_fused_infer_attention_score"):
        compiled(function)(q)


def test_an_unknown_operator_names_itself_and_its_fx_node(npu: torch.device) -> None:
    x, target = numbers((8, 5), torch.float32).to(npu), torch.arange(8, device=npu) % 5
    message = "GE operator NLLLoss .*FX node .*nll_loss_forward.*not emulated; see 'Adding an operator'"

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.nll_loss_forward(x, target, None, 1, -100)[0]

    with pytest.raises(Exception, match=message):
        compiled(function)(x)


def test_an_argument_changed_in_place(npu: torch.device) -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(y)
        return x * 2

    x, y = numbers((3, 4), HALF), numbers((3, 4), HALF, 1)
    there = x.to(npu)
    result = compiled(function)(there, y.to(npu))
    close(there, (x + y).float(), 1)
    close(result, (x + y).float() * 2, 1)


def test_random_numbers_follow_the_seed(npu: torch.device) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(64, 64, device=x.device)

    draw = compiled(function)
    x = torch.zeros(64, 64, device=npu)
    torch.npu.manual_seed(3)
    first, second = draw(x), draw(x)
    torch.npu.manual_seed(3)
    assert torch.equal(first.cpu(), draw(x).cpu()) and not torch.equal(first.cpu(), second.cpu())
    assert 0.45 < first.mean().item() < 0.55


def test_linear_weights_stay_in_the_format_of_the_matrix_unit(npu: torch.device, tmp_path: Path) -> None:
    class Model(nn.Module):  # Dynamo does not compile torch's own modules by themselves
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(40, 64), nn.Linear(64, 24, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(F.silu(self.first(x)))

    model = Model().to(HALF)
    x = numbers((2, 17, 40), HALF)
    with torch.no_grad():
        truth = model.float()(x.float())
        model = model.to(HALF).to(npu)
        compile_module(model, tmp_path)
        assert torch_npu.get_npu_format(model.first.weight) == FRACTAL_NZ
        close(model(x.to(npu)), truth, 8)


def test_a_unet_is_one_graph_and_computes_what_eager_does(npu: torch.device, tmp_path: Path) -> None:
    unet = tiny_unet().eval().to(npu, HALF)
    latents, text = numbers((2, 4, 16, 16), HALF).to(npu), numbers((2, 7, 32), HALF, 1).to(npu)
    steps = torch.tensor([10, 500], device=npu)
    with torch.no_grad():
        eager = unet(latents, steps, text).sample.cpu().float()
        explanation = torch._dynamo.utils.counters
        explanation.clear()
        compile_module(unet, tmp_path)
        graph = unet(latents, steps, text).sample.cpu().float()
    assert explanation["stats"]["unique_graphs"] == 1 and not explanation["graph_break"]
    assert (graph - eager).abs().mean() < 8 * TOLERANCES[HALF] * eager.abs().mean()


def test_a_module_that_is_imported_late_makes_no_graph_anew(npu: torch.device, tmp_path: Path) -> None:
    layer, x = nn.Linear(16, 16).eval().to(npu, HALF), numbers((2, 16), HALF).to(npu)
    with torch.no_grad():
        compile_module(layer, tmp_path)
        before = layer(x)
        counters = torch._dynamo.utils.counters["stats"]
        graphs = counters["unique_graphs"]

        class Output(BaseOutput):  # as each scheduler's module defines one, which diffusers makes known to pytree
            sample: torch.Tensor

        assert torch.equal(layer(x), before)
    assert Output in SUPPORTED_NODES and counters["unique_graphs"] == graphs


def test_equal_computations_run_once(npu: torch.device) -> None:
    operators: list[str] = []
    config = make_config()
    config.post_grad_custom_post_pass = lambda module, *_: operators.extend(str(n.target) for n in module.graph.nodes)

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.silu(x) @ y + F.silu(x)

    x, y = numbers((8, 8), HALF), numbers((8, 8), HALF, 1)
    close(compiled(function, config)(x.to(npu), y.to(npu)), function(x.float(), y.float()), 64)
    assert operators.count("aten.silu.default") == 1


@pytest.mark.parametrize(("h", "w", "ratio"), [(8, 8, 0.5), (12, 4, 0.5), (6, 6, 0.5), (8, 8, 0.25)])
def test_token_merging_as_a_graph(npu: torch.device, h: int, w: int, ratio: float) -> None:
    """Fused on 310P where half of the tokens merge and eight cores can share them; the same result everywhere."""
    operators: list[str] = []
    config = make_config()
    config.post_grad_custom_post_pass = lambda module, *_: operators.extend(str(n.target) for n in module.graph.nodes)
    merged = count_merged(h, w, 2, 2, ratio)

    def function(metric: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        matching = match(metric, partition(h, w, 2, 2, metric.device), merged)
        kernels = npu_tome if npu_tome.is_fused(tokens, merged) else tome
        few = kernels.merge(tokens, matching)
        return few.sum(1), kernels.unmerge(few, matching)  # the rows of `few` may be in another order

    metric, tokens = numbers((2, h * w, 64), HALF).to(npu), numbers((2, h * w, 16), HALF, 1).to(npu)
    eager = function(metric, tokens)
    graph = compiled(function, config)(metric, tokens)
    close(graph[0], eager[0].cpu().float(), 8)
    close(graph[1], eager[1].cpu().float(), 4)
    fused = SATURATES and merged == h * w // 2 and merged % 8 == 0
    assert operators.count("npu_inference.npu_tome_merge.default") == fused
    assert operators.count("npu_inference.npu_tome_unmerge.default") == fused


def test_token_merging_of_another_rate_is_refused(npu: torch.device) -> None:
    """torchair hands GE the default, and GE merges half of the tokens."""
    make_config()
    sources, destinations = numbers((1, 48, 16), torch.float16).to(npu), numbers((1, 16, 16), torch.float16).to(npu)
    order = torch.arange(48, device=npu).unsqueeze(0)

    def function(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.ops.npu_inference.npu_tome_merge(a, b, order, order // 3, 0.25)[0]

    with pytest.raises(Exception, match=r"\[1, 16, 16\] is not equal to FX graph NetOutput: \[1, 32, 16\]"):
        compiled(function)(sources, destinations)


@pytest.mark.skipif(not os.environ.get("CANN_EMULATOR_SOC"), reason="the trace is the emulator's")
def test_weights_and_upsampling_are_not_taken_apart(npu: torch.device, tmp_path: Path) -> None:
    """No weight is converted, in both processes: that which compiles, and that which finds the graph."""
    program = textwrap.dedent(
        """
        import torch
        from pathlib import Path
        from ascend.device import DeviceManager
        from ascend.graphs.compile import compile_module
        from tests.tiny_models import small_unet

        device = DeviceManager("npu").device
        unet = small_unet().eval().to(device, {dtype})
        latents, text = torch.ones(1, 4, 16, 16).to(device, {dtype}), torch.ones(1, 7, 32).to(device, {dtype})
        compile_module(unet, Path({cache!r}))
        with torch.no_grad():
            unet(latents, torch.tensor([10], device=device), text)
        """
    ).format(cache=str(tmp_path / "graphs"), dtype=HALF)
    script, trace = tmp_path / "model.py", tmp_path / "trace.jsonl"
    script.write_text(program)
    for _ in range(2):
        trace.unlink(missing_ok=True)
        subprocess.run([sys.executable, script], check=True, env=environment(CANN_EMULATOR_TRACE=str(trace)))
        events = [json.loads(line) for line in trace.read_text().splitlines()]
        launches = [event for event in events if event["event"] == "launch" and "graph" in event]
        stored = {(e["operator"], tensor["name"], tensor["format"]) for e in launches for tensor in e["tensors"]}
        assert ("MatMulV2", "x2", "FRACTAL_NZ") in stored and ("Conv2D", "filter", "FRACTAL_Z") in stored
        assert "ResizeNearestNeighborV2" in {operator for operator, _, _ in stored}  # in the first graph of a process
        converted = [event["tensors"][0]["format"] for event in launches if event["operator"] == "TransData"]
        assert converted and not {"FRACTAL_NZ", "FRACTAL_Z"} & set(converted)


@pytest.mark.skipif(not os.environ.get("CANN_EMULATOR_SOC"), reason="the trace is the emulator's")
def test_the_trace_describes_a_graph(npu: torch.device, tmp_path: Path) -> None:
    script = tmp_path / "graph.py"
    script.write_text(
        "import torch, torch_npu, torchair\n"
        "compute = torch.compile(lambda x: torch.relu(x.t() @ x), backend=torchair.get_npu_backend(), dynamic=False)\n"
        "compute(torch.ones(8, 8).half().npu())\n"
    )
    trace = tmp_path / "trace.jsonl"
    subprocess.run([sys.executable, script], check=True, env={**os.environ, "CANN_EMULATOR_TRACE": str(trace)})
    events = [json.loads(line) for line in trace.read_text().splitlines()]
    [graph] = [event for event in events if event["event"] == "compile"]
    launches = [event["operator"] for event in events if event.get("graph") == graph["graph"] and event is not graph]
    assert launches == ["MatMul", "Relu"]  # the product reads its operand transposed
    assert [event["flops"] for event in events if event.get("operator") == "MatMul"] == [2 * 8**3]
    product, relu = graph["steps"]
    assert relu["fx"] == "relu-aten.relu.default" and relu["reads"] == product["writes"]
    assert graph["launches"] == 2 and graph["fused"] == 1 and graph["feature_bytes"] >= 8 * 8 * 2


@pytest.mark.skipif(not os.environ.get("CANN_EMULATOR_SOC"), reason="the trace is the emulator's")
def test_the_trace_counts_attention_in_a_graph_as_without(npu: torch.device, tmp_path: Path) -> None:
    """910B3's has a list of keys in a graph, of one name with a number."""
    script = tmp_path / "attention.py"
    kernel = "prompt_flash_attention" if SATURATES else "fused_infer_attention_score"
    script.write_text(
        "import torch, torch_npu, torchair\n"
        "torch.npu.set_compile_mode(jit_compile=False)\n"
        "def attend(q, k):\n"
        f"    out = torch.ops.npu.npu_{kernel}(q, k, k, num_heads=4, input_layout='BSH')\n"
        f"    return {'out' if SATURATES else 'out[0]'}\n"
        "tensors = torch.ones(2, 32, 64).half().npu(), torch.ones(2, 48, 64).half().npu()\n"
        "attend(*tensors)\n"
        "torch.compile(attend, backend=torchair.get_npu_backend(), dynamic=False)(*tensors)\n"
    )
    trace = tmp_path / "trace.jsonl"
    subprocess.run([sys.executable, script], check=True, env={**os.environ, "CANN_EMULATOR_TRACE": str(trace)})
    events = [json.loads(line) for line in trace.read_text().splitlines()]
    counted = {"graph" in e: e["flops"] for e in events if e["event"] == "launch" and "Attention" in e["operator"]}
    assert counted == dict.fromkeys((False, True), 2 * 2 * (2 * 32 * 64) * 48)  # two products
