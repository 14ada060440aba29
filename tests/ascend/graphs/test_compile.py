"""`compile_pipeline` on the CPU: one graph for each kind of call, the pictures of eager mode."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import BaseOutput
from torch import nn
from torch.utils import _pytree as pytree

from ascend.graphs.compile import compile_module, compile_pipeline
from processors.kernels.quantized import quantize
from tests.programs import ROOT


def draw(pipe: StableDiffusionPipeline, prompt: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(
        prompt, num_inference_steps=3, height=64, width=64, cache_interval=2, generator=generator, output_type="pt"
    ).images


@torch.no_grad()
@pytest.mark.parametrize("name", ["text_encoder", "decoder"])
def test_each_component_is_one_graph(tiny_sd: StableDiffusionPipeline, name: str) -> None:
    module = {"text_encoder": tiny_sd.text_encoder, "decoder": tiny_sd.vae.decoder}[name]
    inputs = {"text_encoder": torch.ones(1, 77, dtype=torch.int64), "decoder": torch.ones(1, 4, 8, 8)}[name]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=False)
    compiled(inputs)
    compiled(inputs + 1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_compiled_pipeline_draws_the_same_without_break_or_recompilation(tiny_sd: StableDiffusionPipeline) -> None:
    plain = [draw(tiny_sd, prompt) for prompt in ("a red circle", "a blue square")]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert compile_pipeline(tiny_sd) == {"text_encoder": "eager", "unet": "inductor", "vae.decoder": "eager"}
    first = draw(tiny_sd, "a red circle")
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2  # the full UNet and the shallow one
    second = draw(tiny_sd, "a blue square")
    assert counters["stats"]["unique_graphs"] == 2
    # Fused kernels round in another order; a denoising loop of 3 steps keeps that far below one of 255 grey levels.
    torch.testing.assert_close(torch.cat([first, second]), torch.cat(plain), atol=1e-3, rtol=0)


@torch.no_grad()
def test_inductor_freezes_weights_and_a_change_of_them_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ascend.graphs.inductor.LARGE", 0)
    module, batch = nn.Linear(16, 16).eval(), torch.ones(2, 16)
    compile_module(module)
    before = module(batch)
    module.weight.data.mul_(2)  # which torch does not count, so that the graph stays
    torch.testing.assert_close(module(batch), before)
    module.weight.mul_(2)
    torch.testing.assert_close(module(batch), batch @ module.weight.t() + module.bias)


@torch.no_grad()
def test_a_module_that_is_imported_late_makes_no_graph_anew() -> None:
    module, batch = nn.Linear(16, 16).eval(), torch.ones(2, 16)
    compile_module(module)
    module(batch)
    counters = torch._dynamo.utils.counters["stats"]
    graphs = counters["unique_graphs"]

    class Output(BaseOutput):  # as each scheduler's module defines one, which diffusers makes known to pytree
        sample: torch.Tensor

    assert Output in pytree.SUPPORTED_NODES
    module(batch)
    assert counters["unique_graphs"] == graphs


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@torch.no_grad()
def test_arguments_may_be_nested_in_anything_that_pytree_knows() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, pair: Pair, scale: float, more: dict[str, list[torch.Tensor]]) -> torch.Tensor:
            return self.linear(pair.first * scale + pair.second) - more["rest"][0]

    model, (a, b, c) = Model().eval(), torch.randn(3, 2, 4)
    expected = model(Pair(a, b), 2.0, {"rest": [c]})
    compile_module(model)
    torch.testing.assert_close(model(Pair(a, b), 2.0, {"rest": [c]}), expected)
    torch.testing.assert_close(model(Pair(b, a), 2.0, {"rest": [c]}), model.linear(b * 2 + a) - c)


@torch.no_grad()
def test_inductor_keeps_no_floats_of_weights_that_are_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ascend.graphs.inductor.LARGE", 0)
    module, batch = nn.Linear(16, 16, bias=False).eval(), torch.ones(2, 16)
    quantize(module)
    compile_module(module)
    before = module(batch)
    module.scale.data.mul_(2)  # which torch does not count: the graph stays, and reads it
    torch.testing.assert_close(module(batch), 2 * before)


TWICE = """
import torch
from torch import nn
from ascend.graphs.compile import compile_module

module = nn.Sequential(nn.Conv2d(4, 32, 3), nn.GroupNorm(32, 32), nn.SiLU()).eval()
compile_module(module)
with torch.no_grad():
    module(torch.ones(1, 4, 8, 8))
print(module.forward.compilations)
"""


def test_a_second_process_finds_a_small_module_in_inductors_cache(tmp_path: Path) -> None:
    # Under $CI inductor is stricter about operators that it does not decompose.
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), "CI": "1"}
    run = partial(subprocess.run, [sys.executable, "-c", TWICE], env=environment, capture_output=True, text=True)
    assert [run(check=True).stdout.strip() for _ in range(2)] == ["1", "0"]


@torch.no_grad()
def test_more_kinds_of_calls_than_dynamo_recompiles(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda function, backend, **options: compile_(function, **options))
    module = nn.Linear(16, 16)
    compile_module(module)
    with torch._dynamo.config.patch(recompile_limit=2):
        for rows in range(1, 6):
            assert module(torch.ones(rows, 16)).shape == (rows, 16)
