"""The blocks of a streamed model as graphs: equal blocks share one, and none that runs without is passed over."""

from __future__ import annotations

import logging

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import nn

from ascend.graphs.blocks import BlockGraphs
from ascend.graphs.compile import compile_module, compile_pipeline, decompile_module, decompile_pipeline
from ascend.graphs.inductor import Inductor
from ascend.graphs.static import Made
from ascend.streaming import stop_streaming, stream_module
from tests.ascend.streaming.test_stream import CPU, Block, Transformer, X


class Tracer(Inductor):
    """Traces as inductor does, and computes what was traced by torch's own kernels: results are eager's to the bit."""

    def make(self, call: object, digest: str, tensors: list[torch.Tensor]) -> Made:
        graph = torch.compile(call, backend="eager", fullgraph=True, dynamic=False)
        return Made(graph, graph(*tensors), is_new=True)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ascend.graphs.compile.Inductor", Tracer)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs_made() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_eight_equal_blocks_share_a_graph(traced: None) -> None:
    model = Transformer(blocks=8).eval().requires_grad_(False)
    expected = model(X)
    stream_module(model, CPU)
    assert compile_module(model) == "inductor, one graph for each of 1 kind of block"
    for _ in range(3):
        assert torch.equal(model(X), expected)
    assert graphs_made() == 1
    model.blocks[3].linear.weight.mul_(2)  # an argument as any
    model.blocks[4].linear.bias = nn.Parameter(torch.ones(32), requires_grad=False)
    changed = model(X)
    assert graphs_made() == 1
    decompile_module(model)
    assert torch.equal(model(X), changed) and "forward" not in vars(model.blocks[0])
    compile_module(model)
    stop_streaming(model)
    assert torch.equal(model(X), changed) and "forward" not in vars(model.blocks[0])


def test_inductor_computes_the_blocks() -> None:
    """It fuses operations, and rounds in another order than torch's kernels: a few units in the last place."""
    model = Transformer(blocks=8).eval().requires_grad_(False)
    expected = model(X)
    stream_module(model, CPU)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_module(model)
    first = model(X)
    assert graphs_made() == 1
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(model(X), first)


@torch.no_grad()
def test_blocks_of_a_unet_take_residuals_and_optional_arguments(traced: None) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=32,
        norm_num_groups=8,
    ).eval()
    inputs = torch.randn(2, 4, 8, 8), torch.tensor(10), torch.randn(2, 7, 32)
    expected = unet(*inputs).sample
    stream = stream_module(unet, CPU)
    compile_module(unet)
    assert torch.equal(unet(*inputs).sample, expected)
    graphs = next(handle for handle in stream.handles if isinstance(handle, BlockGraphs))
    assert not graphs.eager and graphs_made() == len(graphs.graphs) == len(stream.copies) - 1  # two equal resnets
    assert torch.equal(unet(*inputs).sample, expected) and graphs_made() == len(graphs.graphs)


class Branching(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.sum() > 0 else -super().forward(x)


class Stray(Block):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.table = [torch.rand(width)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.table[0]


@pytest.mark.parametrize(("kind", "reason"), [(Branching, "ata-dependent"), (Stray, "table holds tensors that are n")])
def test_a_block_that_cannot_be_compiled_is_named_and_computed(
    traced: None, kind: type[Block], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Transformer(blocks=4).eval()
    for number in (1, 3):
        model.blocks[number] = kind(32)
    model.eval().requires_grad_(False)
    expected = model(X)
    stream_module(model, CPU)
    with caplog.at_level(logging.WARNING):
        compile_module(model, name="transformer")
        for _ in range(2):
            assert torch.equal(model(X), expected)
    messages = [record.message for record in caplog.records if record.name == "ascend.graphs.blocks"]
    assert len(messages) == 1 and graphs_made() >= 1
    assert messages[0].startswith(f"transformer: {kind.__name__} is not compiled and runs in eager mode: ")
    assert reason in messages[0]


def test_a_block_that_changes_gets_another_graph_and_the_others_keep_theirs(traced: None) -> None:
    model, plain = (Transformer(blocks=4).eval().requires_grad_(False) for _ in range(2))
    stream_module(model, CPU)
    compile_module(model)
    assert torch.equal(model(X), plain(X)) and graphs_made() == 1
    for each in (model, plain):
        each.blocks[0].linear = nn.Sequential(each.blocks[0].linear, nn.Tanh())  # of which the graph was made
    assert torch.equal(model(X), plain(X)) and graphs_made() == 2
    assert torch.equal(model(X.double().float()), plain(X)) and graphs_made() == 2


def test_a_streamed_pipeline_says_how_it_is_compiled(tiny_sd: StableDiffusionPipeline) -> None:
    stream_module(tiny_sd.unet, CPU)
    compiled = {"text_encoder": "eager", "unet": "inductor, one graph for each of 9 kinds of block"}
    assert compile_pipeline(tiny_sd) == compile_pipeline(tiny_sd) == {**compiled, "vae.decoder": "eager"}
    decompile_pipeline(tiny_sd)
    assert not any("forward" in vars(block) for block in tiny_sd.unet.down_blocks)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_streamed_pipeline_of_graphs_draws_the_same(traced: None, tiny_sd: StableDiffusionPipeline) -> None:
    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 3, "output_type": "pt", "cache_interval": 2}
        return tiny_sd("a cat", generator=generator, **options).images

    expected = draw()
    stream_module(tiny_sd.unet, CPU)
    compile_pipeline(tiny_sd)
    assert torch.equal(draw(), expected)
    made = graphs_made()
    assert torch.equal(draw(), expected) and graphs_made() == made
