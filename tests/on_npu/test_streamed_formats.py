"""Streamed weights in the chip's private formats: the bytes that a resident weight has, and its results to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_npu
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ascend.graphs.compile import compile_module, decompile_module
from ascend.graphs.torchair import use_private_formats
from ascend.streaming import lend_module, stop_streaming, stream_module
from ascend.streaming.blocks import aligned, bytes_of
from tests.ascend.streaming.test_stream import Transformer
from tests.on_npu.helpers import SATURATES
from tests.tiny_models import CROSS_ATTENTION_DIM, tiny_unet

HALF = torch.float16 if SATURATES else torch.bfloat16
ND, NCHW, FRACTAL_Z, FRACTAL_NZ = 2, 0, 4, 29
WIDTH = 250  # of 16 fractals, the last not full
X = torch.linspace(-1, 1, 12).view(3, 4).to(HALF)


@pytest.fixture(autouse=True)
def internal_formats() -> Iterator[None]:
    yield
    torch.npu.config.allow_internal_format = False


def cast_linear(model: nn.Module) -> None:
    torch.npu.config.allow_internal_format = True
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = torch_npu.npu_format_cast(layer.weight.data, FRACTAL_NZ)
    torch.npu.config.allow_internal_format = False


def make_transformer(npu: torch.device | None = None, blocks: int = 6) -> Transformer:
    """In FRACTAL_NZ, if on a device."""
    model = Transformer(blocks=blocks, width=WIDTH).eval().requires_grad_(False).to(HALF)
    if npu is not None:
        cast_linear(model.to(npu).blocks)
    return model


class Seen:
    """The formats that the weights of blocks have when these are called; made after the blocks are streamed."""

    def __init__(self, model: Transformer) -> None:
        self.formats: list[int] = []
        self.handles = [block.register_forward_pre_hook(self._look) for block in model.blocks]

    def _look(self, block: Any, _: Any) -> None:
        self.formats.append(int(torch_npu.get_npu_format(block.linear.weight)))

    def take(self) -> list[int]:
        formats, self.formats = self.formats, []
        return formats


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_weight_keeps_its_format_while_it_is_streamed(npu: torch.device) -> None:
    x = X.to(npu)
    expected = make_transformer(npu)(x)
    model = make_transformer(npu)
    stream = stream_module(model, npu)
    seen = Seen(model)
    for _ in range(3):
        with Calls() as calls:
            result = model(x)
        assert torch.equal(result, expected)
        assert seen.take() == [FRACTAL_NZ] * 6
        assert any("addmm" in name for name in calls.names) and not any("format_cast" in name for name in calls.names)
    assert stream.statistics.wrong_guesses == 0
    stop_streaming(model)
    for here, there in zip(model.parameters(), make_transformer().parameters(), strict=True):
        assert here.device.type == "cpu" and torch.equal(here, there)


def test_peak_memory_is_two_blocks_and_their_padding(npu: torch.device) -> None:
    x, model = X.to(npu), make_transformer(npu)
    expected = model(x)
    whole = bytes_of(model)
    padded = 256 * 256 * HALF.itemsize
    block = bytes_of(model.blocks[0]) + aligned(padded) - aligned(model.blocks[0].linear.weight.nbytes)
    before = torch.npu.memory_allocated(npu)
    stream = stream_module(model, npu)
    assert torch.npu.memory_allocated(npu) < before - whole / 2  # their memory of the device is free
    before = torch.npu.memory_allocated(npu)
    torch.npu.reset_peak_memory_stats(npu)
    for _ in range(3):
        assert torch.equal(model(x), expected)
    activations = 8 * aligned(3 * WIDTH * 2)
    assert 2 * block <= torch.npu.max_memory_allocated(npu) - before <= 2 * block + activations
    stream.buffers.drop()
    assert torch.npu.memory_allocated(npu) == before
    assert torch.equal(model(x), expected)  # with other buffers


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("shape", [(16, 32), (20, 33), (40, 5, 3, 3)], ids=str)
def test_values_of_a_format_come_back(npu: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The kernels of the emulator have no int8 in FRACTAL_Z."""
    number = FRACTAL_NZ if len(shape) == 2 or dtype == torch.int8 else FRACTAL_Z
    values = [torch.randint(-99, 99, shape).to(dtype) for _ in range(3)]
    model = nn.Sequential(nn.ModuleList(Holder(value.to(npu), number) for value in values))
    model.forward = lambda: [holder() for holder in model[0]]
    stream_module(model, npu)
    for held, value in zip(model(), values, strict=True):
        assert held[0] == number and torch.equal(held[1], value)
    stop_streaming(model)
    assert all(torch.equal(holder.values, value) for holder, value in zip(model[0], values, strict=True))


class Holder(nn.Module):
    def __init__(self, values: torch.Tensor, number: int) -> None:
        super().__init__()
        torch.npu.config.allow_internal_format = True
        self.register_buffer("values", torch_npu.npu_format_cast(values, number))

    def forward(self) -> tuple[int, torch.Tensor]:
        return int(torch_npu.get_npu_format(self.values)), self.values.cpu()


def test_who_reads_or_changes_a_locked_weight_is_told(npu: torch.device) -> None:
    model, x = make_transformer(npu), X.to(npu)
    expected = model(x)
    stream_module(model, npu)
    weight = model.blocks[2].linear.weight
    for meddle in (
        lambda: [value.clone() for value in model.state_dict().values()],
        lambda: weight.add_(1),
        lambda: weight.data.mul_(2),
        lambda: model.load_state_dict(make_transformer().state_dict()),
        lambda: model.float(),
    ):
        with pytest.raises(RuntimeError, match=r"in a format of the chip's own.* stop_streaming\(model\)"):
            meddle()
    assert weight.shape == (WIDTH, WIDTH) and weight.dtype == HALF and weight.device.type == "cpu"
    model.to("cpu").to(HALF)  # where and what they are
    model.embed.to(npu)
    assert torch.equal(model(x), expected)


def test_what_changes_around_a_locked_weight_leaves_its_format(npu: torch.device) -> None:
    model, plain, x = make_transformer(npu), make_transformer(npu), X.to(npu)
    stream_module(model, npu)
    seen = Seen(model)
    model(x)
    for changed in (model, plain):
        device = changed.blocks[3].linear.bias.device
        changed.blocks[3].linear.bias = nn.Parameter(torch.ones(WIDTH, dtype=HALF, device=device), False)
        weight = torch.eye(WIDTH, dtype=HALF, device=device)
        changed.blocks[4].linear.weight.data = weight
    seen.take()
    assert torch.equal(model(x), plain(x))
    assert seen.take() == [FRACTAL_NZ] * 4 + [ND, FRACTAL_NZ]  # what was put there was in no format
    stop_streaming(model)
    assert torch.equal(model.blocks[3].linear.weight, plain.blocks[3].linear.weight.cpu())
    assert torch.equal(model.blocks[4].linear.weight, plain.blocks[4].linear.weight.cpu())


@torch.no_grad()
def test_adapters_come_and_go_while_a_unet_is_in_formats(npu: torch.device) -> None:
    """FRACTAL_NZ and the FRACTAL_Z of convolutions."""
    torch.manual_seed(1)
    inputs = [torch.randn(2, 4, 16, 16), torch.tensor(10), torch.randn(2, 7, CROSS_ATTENTION_DIM)]
    inputs = [x.to(npu, torch.float16) if x.is_floating_point() else x.to(npu) for x in inputs]
    resident, unet = (tiny_unet().eval().half() for _ in range(2))
    unet.load_state_dict(resident.state_dict())
    for model in (resident, unet):
        use_private_formats(model.to(npu))
    stream_module(unet, npu)
    plain = resident(*inputs).sample
    assert torch.equal(unet(*inputs).sample, plain)
    for model in (resident, unet):
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "proj_in"], init_lora_weights=False))
    adapted = resident.to(npu)(*inputs).sample
    assert not torch.equal(adapted, plain)
    assert torch.equal(unet(*inputs).sample, adapted)
    with pytest.raises(RuntimeError, match="in a format of the chip's own"):
        unet.fuse_lora()
    assert torch.equal(unet(*inputs).sample, adapted)
    unet.disable_adapters()
    assert torch.equal(unet(*inputs).sample, plain)
    stop_streaming(unet)
    pairs = zip(unet.state_dict().values(), resident.state_dict().values(), strict=True)
    assert all(torch.equal(here, there.cpu()) for here, there in pairs)


def test_a_lent_model_keeps_its_formats(npu: torch.device) -> None:
    model, x = make_transformer(npu), X.to(npu)
    expected = model(x)
    before = torch.npu.memory_allocated(npu)
    loan = lend_module(model, npu)
    seen = Seen(model)
    for _ in range(2):
        assert torch.equal(model(x), expected)
        assert torch.npu.memory_allocated(npu) < before
    assert seen.take() == [FRACTAL_NZ] * 12 and loan.buffer is None
    stop_streaming(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), make_transformer().parameters(), strict=True))


def test_a_weight_that_is_a_view_of_one_in_a_format_is_streamed_as_nd(
    npu: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = make_transformer(npu), X.to(npu)
    for block in model.blocks:
        block.linear.weight.data = block.linear.weight.data.t()
    expected = model(x)
    stream_module(model, npu)
    seen = Seen(model)
    torch.testing.assert_close(model(x), expected, rtol=4e-3, atol=4e-3)  # which round in another order
    assert set(seen.take()) <= {ND, NCHW} and "FRACTAL_NZ: it is streamed as ND" in caplog.text


@pytest.mark.parametrize("kept", [(), ("blocks.1", "blocks.4")])
def test_graphs_of_streamed_blocks_compute_what_graphs_of_resident_ones_do(
    npu: torch.device, tmp_path: Path, kept: tuple[str, ...]
) -> None:
    x, resident = X.to(npu), make_transformer().to(npu)
    for block in resident.blocks:
        compile_module(block, tmp_path)
    expected = resident(x)
    assert {int(torch_npu.get_npu_format(block.linear.weight)) for block in resident.blocks} == {FRACTAL_NZ}
    model = make_transformer()
    stream = stream_module(model, npu, kept=kept)
    seen = Seen(model)
    plain = model(x)
    assert set(seen.take()) <= {ND, NCHW}
    compile_module(model, tmp_path)
    for _ in range(2):
        assert torch.equal(model(x), expected)
    assert seen.take() == [FRACTAL_NZ] * 12
    graphs = stream.handles[-1]
    assert not graphs.eager and len(graphs.graphs) == 1
    decompile_module(model)
    assert torch.equal(model(x), plain) and set(seen.take()) <= {ND, NCHW}
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), make_transformer().parameters(), strict=True)
        if a.device.type == "cpu"
    )


def test_kept_blocks_get_the_format_of_new_weights_and_let_go_of_the_old(npu: torch.device, tmp_path: Path) -> None:
    x, model = X.to(npu), make_transformer()
    stream_module(model, npu, kept=("blocks.1", "blocks.4"))
    seen = Seen(model)
    compile_module(model, tmp_path)
    expected = model(x)
    before = torch.npu.memory_allocated()
    for _ in range(2):
        seen.take()
        model.load_state_dict(
            {name: tensor.clone() for name, tensor in make_transformer().state_dict().items()}, assign=True
        )
        assert torch.equal(model(x), expected)
        assert set(seen.take()) == {FRACTAL_NZ}
    assert torch.npu.memory_allocated() <= before + 4096


def test_weights_that_change_under_graphs_get_the_format_again(npu: torch.device, tmp_path: Path) -> None:
    x, model = X.to(npu), make_transformer()
    torch.npu.empty_cache()
    stream = stream_module(model, npu)
    seen = Seen(model)
    compile_module(model, tmp_path)
    first = model(x)
    block = sum(size * dtype.itemsize for dtype, size in stream.buffers.sizes.items())
    before = torch.npu.memory_allocated(npu) - 2 * block
    torch.npu.reset_peak_memory_stats(npu)
    other = torch.eye(WIDTH, dtype=HALF)
    model.blocks[4].linear.weight.data = other
    seen.take()
    assert not torch.equal(model(x), first) and seen.take() == [FRACTAL_NZ] * 6
    assert torch.npu.max_memory_allocated(npu) - before <= 2 * block + 8 * aligned(3 * WIDTH * 2)
    stop_streaming(model)
    assert torch.equal(model.blocks[4].linear.weight, other)
    assert torch.equal(model.blocks[3].linear.weight, make_transformer().blocks[3].linear.weight)


def test_blocks_from_files_stay_as_they_are_there(npu: torch.device, tmp_path: Path) -> None:
    x, model = X.to(npu), make_transformer()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    stream_module(model, npu, is_mapped=True)
    seen = Seen(model)
    compile_module(model, tmp_path / "graphs")
    first = model(x)
    assert torch.equal(model(x), first) and set(seen.take()) <= {ND, NCHW}
    other = make_transformer()
    stream_module(other, npu)
    compile_module(other, tmp_path / "graphs")
    other(x)
    assert len([path for path in (tmp_path / "graphs").glob("Block-*") if path.is_dir()]) == 2, "one for each format"
    assert torch.equal(model.blocks[0].linear.weight, make_transformer().blocks[0].linear.weight)
