"""What a UNet's graph launches: the time in few products, sums with their norms, and no map converted for nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch_npu
import torchair
from diffusers import UNet2DConditionModel
from torch import nn

from ascend.graphs.compile import compile_module, decompile_module
from ascend.graphs.torchair import make_config
from processors import enable_flash_attention
from tests.on_npu.helpers import FLOATS, SATURATES, TOLERANCES, reference
from tests.on_npu.inputs import numbers
from tests.programs import environment
from tests.tiny_models import small_unet

HALF = torch.float16 if SATURATES else torch.bfloat16

# Computes a step of a UNet twice, as a graph that is found on disk the second time, and counts the last call.
PROGRAM = textwrap.dedent(
    """
    import torch
    from pathlib import Path
    from ascend.device import DeviceManager
    from ascend.graphs.compile import compile_module
    from processors import enable_flash_attention
    from tests.tiny_models import small_unet

    device = DeviceManager("npu").device
    unet = small_unet().eval().to(device, {dtype})
    latents, text = torch.ones(2, 4, 16, 16).to(device, {dtype}), torch.ones(2, 7, 32).to(device, {dtype})
    enable_flash_attention(unet)
    compile_module(unet, Path({cache!r}))
    with torch.no_grad():
        unet(latents, torch.tensor(10, device=device), text)
    """
)


@pytest.mark.skipif(not os.environ.get("CANN_EMULATOR_SOC"), reason="the trace is the emulator's")
def test_what_a_step_launches(tmp_path: Path) -> None:
    """Two levels: 8 residual blocks of two widths, 4 of attention, a convolution before and after each level."""
    script, trace = tmp_path / "model.py", tmp_path / "trace.jsonl"
    script.write_text(PROGRAM.format(cache=str(tmp_path / "graphs"), dtype=HALF))
    for _ in range(2):
        trace.unlink(missing_ok=True)
        subprocess.run([sys.executable, script], check=True, env=environment(CANN_EMULATOR_TRACE=str(trace)))
        events = [json.loads(line) for line in trace.read_text().splitlines()]
        launches = [event for event in events if event["event"] == "launch" and "graph" in event]
        counts = Counter(event["operator"] for event in launches)
        shapes = [[tensor["shape"] for tensor in event["tensors"]] for event in launches if event["operator"] == "Add"]
        assert all(first == second for first, second, _ in shapes)  # no numbers of channels, no biases
        assert counts["Add"] == 8 + 4 + 4  # residual connections: of blocks, of maps, before the last projection
        assert (counts["AddLayerNorm"], counts["LayerNormV4"]) == (8, 4)
        assert counts["SplitV"] == 2
        assert counts["TransData"] == 44


def time_projections(unet: UNet2DConditionModel) -> list[nn.Linear]:
    return [module for name, module in unet.named_modules() if name.endswith("time_emb_proj")]


@torch.no_grad()
def unet_and_inputs(npu: torch.device) -> tuple[UNet2DConditionModel, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    unet = small_unet().eval().to(npu, HALF)
    enable_flash_attention(unet)
    for projection in time_projections(unet):
        projection.weight.mul_(20)  # a random UNet hardly depends on the time
    return unet, numbers((2, 4, 16, 16), HALF).to(npu), numbers((2, 7, 32), HALF, 1).to(npu)


def far(result: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((result - expected).abs().mean() > 8 * TOLERANCES[HALF] * expected.abs().mean())


@torch.no_grad()
def test_pictures_at_timesteps_of_their_own_and_other_weights(npu: torch.device, tmp_path: Path) -> None:
    unet, latents, text = unet_and_inputs(npu)
    steps = torch.tensor([10, 900], device=npu)

    def draw(steps: torch.Tensor) -> torch.Tensor:
        return unet(latents, steps, text).sample.float().cpu()

    eager = draw(steps)
    assert far(draw(steps[0]), eager)
    names = unet.state_dict().keys()
    compile_module(unet, tmp_path)
    assert unet.state_dict().keys() == names
    assert not far(draw(steps), eager)
    for projection in time_projections(unet):
        projection.weight.neg_()
    graph = draw(steps)
    assert far(graph, eager)
    decompile_module(unet)
    assert not far(graph, draw(steps))
    assert not any(hasattr(module, "time_projections") for module in unet.modules())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.project = nn.LayerNorm(32), nn.Linear(32, 48)

    def forward(self, x: torch.Tensor, y: torch.Tensor, maps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = x + y
        return self.norm(total), total, self.project(maps.permute(0, 2, 1))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@torch.no_grad()
def test_the_fused_operators_compute_what_the_cpu_does(npu: torch.device, dtype: torch.dtype) -> None:
    """AddLayerNorm and a product of a batch with a bias."""
    operators: list[str] = []
    config = make_config()
    config.post_grad_custom_post_pass = lambda module, *_: operators.extend(str(n.target) for n in module.graph.nodes)
    torch._dynamo.reset()
    model = Residual().to(dtype)
    inputs = [numbers((2, 5, 32), dtype), numbers((2, 5, 32), dtype, 1), numbers((2, 32, 7), dtype, 2)]
    expected = model.float()(*map(reference, inputs))
    model = model.to(npu, dtype)
    backend = torchair.get_npu_backend(compiler_config=config)
    results = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(*(x.to(npu) for x in inputs))
    factors = (8, 1, 2**13 if dtype == torch.float32 else 64)  # the matrix units round float32 to 10 bits
    for result, wanted, factor in zip(results, expected, factors, strict=True):
        limit = factor * TOLERANCES[dtype] * wanted.double().abs().clamp_min(1)
        assert ((result.cpu().double() - wanted.double()).abs() <= limit).all()
    assert {"npu.npu_add_layer_norm.default", "aten.linear.default"} <= set(operators)


@pytest.mark.skipif(not SATURATES, reason="310P alone wants 32 bytes")
def test_rows_of_fewer_bytes_than_310p_takes_are_normed_by_themselves(npu: torch.device) -> None:
    x, vector = numbers((4, 8), torch.float16).to(npu), torch.ones(8, dtype=torch.float16, device=npu)
    with pytest.raises(RuntimeError, match="at least 32 bytes"):
        torch_npu.npu_add_layer_norm(x, x, vector, vector)
