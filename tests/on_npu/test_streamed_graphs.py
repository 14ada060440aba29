"""Blocks of streamed models as the chip's graphs: weights are arguments, so that equal blocks share one.

SD2.1's topology, whose blocks are a dozen graphs, is slow:
python -m emulator run --soc Ascend310P3 -- python -m pytest -m slow tests/on_npu/test_streamed_graphs.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from ascend.graphs.compile import compile_module
from ascend.streaming import stop_streaming, stream_module
from tests.on_npu.test_streaming import HALF, X, make_transformer
from tests.tiny_models import CROSS_ATTENTION_DIM, small_unet, tiny_unet


def test_eight_equal_blocks_are_one_graph_on_disk(npu: torch.device, tmp_path: Path) -> None:
    x = X.to(npu)
    resident = make_transformer().to(npu)
    expected = resident(x)
    model = make_transformer()
    for _ in range(2):  # the second time from disk
        stream_module(model, npu)
        assert compile_module(model, tmp_path) == "torchair, one graph for each of 1 kind of block"
        first = model(x)
        # GE rounds to float16 after other operations than eager mode does.
        torch.testing.assert_close(first, expected, rtol=4e-3, atol=4e-3)
        assert torch.equal(model(x), first)
        assert len([path for path in tmp_path.glob("Block-*") if path.is_dir()]) == 1
        stop_streaming(model)


@pytest.mark.parametrize("make_unet", [small_unet, pytest.param(tiny_unet, marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_streamed_unet_of_graphs_is_the_resident_one(
    npu: torch.device, tmp_path: Path, make_unet: Callable[[], UNet2DConditionModel]
) -> None:
    torch.manual_seed(1)
    inputs = [torch.randn(2, 4, 16, 16), torch.tensor(10), torch.randn(2, 7, CROSS_ATTENTION_DIM)]
    inputs = [x.to(npu, HALF) if x.is_floating_point() else x.to(npu) for x in inputs]
    unet = make_unet().eval().to(npu, HALF)
    expected = unet(*inputs).sample
    stream = stream_module(unet, npu)
    compile_module(unet, tmp_path)
    first = unet(*inputs).sample
    torch.testing.assert_close(first, expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(unet(*inputs).sample, first)
    graphs = next(handle for handle in stream.handles if hasattr(handle, "eager"))
    assert not graphs.eager
