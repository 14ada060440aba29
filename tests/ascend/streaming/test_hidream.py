"""HiDream, whose blocks are of two kinds and sizes and hold lists of experts, streamed block by block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ascend.streaming import find_blocks, stop_streaming, stream_module
from ascend.streaming.blocks import bytes_of
from tests.fork.test_npu_guards import hidream_noise, tiny_hidream


def test_its_blocks_are_its_layers_and_the_projections_of_its_prompts() -> None:
    model = tiny_hidream()
    layers = ["double_stream_blocks.0", "single_stream_blocks.0"]
    projections = [f"caption_projection.{number}" for number in range(3)]
    assert list(find_blocks(model)) == layers + projections
    sizes = [bytes_of(block) for block in find_blocks(model).values()]
    assert sizes[0] > sizes[1] > sizes[2]
    # A layer that is larger than a block may be is taken apart into its experts, and what is around them stays.
    fine = find_blocks(model, sizes[1] - 1)
    assert {f"{layer}.block.ff_i.experts.{number}" for layer in layers for number in range(4)} <= set(fine)


@pytest.mark.parametrize("is_mapped", [False, True])
@pytest.mark.parametrize("largest", [None, 1])
def test_a_streamed_hidream_is_the_resident_one(tmp_path: Path, is_mapped: bool, largest: int | None) -> None:
    model = tiny_hidream()
    expected = hidream_noise(model)
    if is_mapped:
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        model.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    stream = stream_module(model, torch.device("cpu"), largest=largest, is_mapped=is_mapped)
    assert torch.equal(hidream_noise(model), expected)
    guesses = stream.statistics.wrong_guesses
    assert torch.equal(hidream_noise(model), expected)
    assert stream.statistics.wrong_guesses == guesses
    stop_streaming(model)
    # Products on the CPU round otherwise where weights are not aligned, as in a file.
    torch.testing.assert_close(hidream_noise(model), expected, rtol=0, atol=1e-5 if is_mapped else 0)
