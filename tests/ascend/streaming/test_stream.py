"""A model whose blocks are streamed computes what it computes on the device, whatever happens between its calls."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

from ascend.streaming import Buffers, find_blocks, lend_module, stop_streaming, stream_module
from ascend.streaming.blocks import bytes_of, tensors_of
from ascend.streaming.host_copy import HostCopy
from tests.tiny_models import CROSS_ATTENTION_DIM, tiny_unet

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.register_buffer("scale", torch.rand(width))
        self.fails = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fails:
            raise RuntimeError("out of memory")
        return torch.tanh(self.linear(x)) * self.scale


class Transformer(nn.Module):
    """Like a diffusion transformer: something around a list of equal blocks, some of which a call may leave out."""

    def __init__(self, blocks: int = 6, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x: torch.Tensor, skip: int = 0) -> torch.Tensor:
        x = self.embed(x)
        for number, block in enumerate(self.blocks):
            if not 0 < number <= skip:
                x = block(x)
        return x


@pytest.fixture
def transformer() -> Transformer:
    return Transformer().eval().requires_grad_(False)


X = torch.linspace(-1, 1, 12).view(3, 4)


def unet_inputs() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    return torch.randn(2, 4, 16, 16), torch.tensor(10), torch.randn(2, 7, CROSS_ATTENTION_DIM)


@torch.no_grad()
def test_a_streamed_unet_is_the_unet() -> None:
    unet, inputs = tiny_unet().eval(), unet_inputs()
    expected = unet(*inputs).sample
    for largest in (None, bytes_of(unet) // 4, 1):
        stream = stream_module(unet, CPU, largest=largest)
        assert torch.equal(unet(*inputs).sample, expected)
        guesses, loads = stream.statistics.wrong_guesses, stream.statistics.loads
        assert torch.equal(unet(*inputs).sample, expected)
        # The order is known after a call.
        assert stream.statistics.wrong_guesses == guesses and stream.statistics.loads == loads + len(stream.copies)
        stop_streaming(unet)
        assert torch.equal(unet(*inputs).sample, expected)


@torch.no_grad()
def test_blocks_that_are_kept_do_not_travel() -> None:
    unet, inputs = tiny_unet().eval(), unet_inputs()
    expected = unet(*inputs).sample
    blocks = find_blocks(unet, 1)
    kept = list(blocks)[1::3]
    stream = stream_module(unet, CPU, largest=1, kept=kept)
    assert torch.equal(unet(*inputs).sample, expected)
    assert {id(block.module) for block in stream.kept} == {id(blocks[name]) for name in kept}
    before = stream.statistics.bytes
    assert torch.equal(unet(*inputs).sample, expected)
    moved = sum(bytes_of(block) for name, block in blocks.items() if name not in kept)
    assert stream.statistics.bytes - before == moved
    stop_streaming(unet)
    assert torch.equal(unet(*inputs).sample, expected)
    for names in (list(blocks), ["down_blocks.9"]):
        with pytest.raises(ValueError, match="kept must name some blocks of down_blocks.0"):
            stream_module(unet, CPU, largest=1, kept=names)


def test_what_stays_on_the_device_is_a_view_of_its_file_again(transformer: Transformer, tmp_path: Path) -> None:
    """Else a model that was too large for the host would be there after all."""
    save_file(transformer.state_dict(), tmp_path / "model.safetensors")
    transformer.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    views = {name: tensor.data_ptr() for name, tensor in transformer.state_dict().items()}
    expected = transformer(X)
    stream_module(transformer, CPU, is_mapped=True, kept=["blocks.1", "blocks.4"])
    assert torch.equal(transformer(X), expected)
    with torch.no_grad():
        transformer.blocks[4].linear.bias.data += 1
    changed = transformer(X)
    stop_streaming(transformer)
    moved = {name for name, tensor in transformer.state_dict().items() if tensor.data_ptr() != views[name]}
    assert moved == {"blocks.4.linear.bias"} and torch.equal(transformer(X), changed)


def test_blocks_are_taken_apart_down_to_a_size() -> None:
    unet = tiny_unet()
    assert list(find_blocks(unet))[:2] == ["down_blocks.0", "down_blocks.1"]
    fine = find_blocks(unet, bytes_of(unet.down_blocks[0]) - 1)
    assert "down_blocks.0.attentions.0" in fine and "mid_block.resnets.1" in fine
    assert all(bytes_of(block) for block in fine.values())


def test_two_blocks_are_on_the_device_and_no_more(transformer: Transformer) -> None:
    buffers = Buffers(CPU)
    stream = stream_module(transformer, CPU, buffers)
    transformer(X)
    block = bytes_of(transformer.blocks[0])
    assert [sum(t.nbytes for t in slot.buffer.values()) for slot in buffers.slots] == [block, block]
    held = {slot.buffer[torch.float32].untyped_storage().data_ptr() for slot in buffers.slots}
    assert all(t.untyped_storage().data_ptr() not in held for t in transformer.parameters()), "at rest with the host"
    assert stream.statistics.bytes == 6 * block
    buffers.drop()
    assert not any(slot.buffer for slot in buffers.slots)
    assert torch.equal(transformer(X), Transformer()(X))


def test_the_next_block_is_copied_while_one_computes(
    transformer: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link that takes as long as the computation: with all copies hidden but the first, half of the time in turn."""
    fill, seconds = HostCopy.fill, 0.03

    def slow_fill(self: HostCopy, buffer: dict[torch.dtype, torch.Tensor]) -> None:
        time.sleep(seconds)
        fill(self, buffer)

    expected = transformer(X)
    monkeypatch.setattr(HostCopy, "fill", slow_fill)
    for block in transformer.blocks:
        block.register_forward_hook(lambda *_: time.sleep(2 * seconds))
    stream = stream_module(transformer, CPU)
    for _ in range(2):
        stream.statistics.stalled_seconds = 0.0
        assert torch.equal(transformer(X), expected)
    assert stream.statistics.stalled_seconds < 3 * seconds  # of six copies; a machine that is busy may lose one more


def test_a_call_that_leaves_blocks_out_computes_right_and_is_counted(transformer: Transformer) -> None:
    full, short = transformer(X), transformer(X, skip=3)
    stream = stream_module(transformer, CPU)
    for _ in range(2):
        assert torch.equal(transformer(X), full)
        assert torch.equal(transformer(X, skip=3), short)
    assert 0 < stream.statistics.wrong_guesses <= 3


def test_calls_of_two_kinds_in_turn_are_guessed_right(transformer: Transformer) -> None:
    """Which blocks run follows from which arguments there are."""
    full, short = transformer(X), transformer(X, skip=3)
    stream = stream_module(transformer, CPU)
    transformer(X)
    transformer(X, skip=3)
    assert stream.statistics.wrong_guesses == 1  # the first block after those that were left out, of a new kind
    for _ in range(2):
        assert torch.equal(transformer(X), full)
        assert torch.equal(transformer(X, skip=3), short)
    assert stream.statistics.wrong_guesses == 1


@pytest.mark.parametrize("layer", [0, 1])
def test_deep_cache_brings_no_block_in_vain(tiny_sd: StableDiffusionPipeline, layer: int) -> None:
    """With the cut in the middle of a block, a full step calls that twice in a row."""

    def draw() -> torch.Tensor:
        cut = {"cache_interval": 2, "cache_block_id": 0, "cache_layer_id": layer}
        generator = torch.Generator().manual_seed(0)
        return tiny_sd("a cat", num_inference_steps=4, generator=generator, output_type="pt", **cut).images

    expected = draw()
    for largest in (None, 1):
        stream = stream_module(tiny_sd.unet, CPU, largest=largest)
        assert torch.equal(draw(), expected)
        guesses, loads = stream.statistics.wrong_guesses, stream.statistics.loads
        kinds = [len(order) for order in stream.orders.of_kinds.values()]
        assert len(kinds) == 2 and kinds[1] < kinds[0] <= len(stream.copies)
        assert torch.equal(draw(), expected)
        assert stream.statistics.wrong_guesses == guesses
        assert stream.statistics.loads == loads + 2 * kinds[0] + 2 * kinds[1]
        stop_streaming(tiny_sd.unet)


def test_what_changes_between_calls_is_seen(transformer: Transformer) -> None:
    stream_module(transformer, CPU)
    transformer(X)
    plain = Transformer().eval()
    with torch.no_grad():
        for model in (transformer, plain):
            model.blocks[0].linear.weight.add_(1)  # the first to be brought
            model.blocks[3].linear.weight.data.mul_(2)
            model.blocks[4].linear.bias = nn.Parameter(torch.ones(32), requires_grad=False)
            model.embed.weight.mul_(3)
    assert torch.equal(transformer(X), plain(X))
    for model in (transformer, plain):
        model.double()
    assert torch.equal(transformer(X.double()), plain(X.double()))
    assert transformer.state_dict().keys() == plain.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(transformer.state_dict().values(), plain.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("change", ["strides", "shape", "dtype"])
def test_what_changes_in_the_same_memory_is_seen(change: str) -> None:
    model = Transformer().eval().requires_grad_(False)
    stream = stream_module(model, CPU)
    model(X)
    weight, other = model.blocks[3].linear.weight, stream.copies[3]
    at = weight.data_ptr()
    if change == "strides":
        weight.data = weight.data.t()
    elif change == "shape":
        weight.data = weight.data[:16]
        model.blocks[3].linear.bias.data = model.blocks[3].linear.bias.data[:16]
        model.blocks[3].scale = model.blocks[3].scale[:16]
        model.blocks[4].linear.weight.data = model.blocks[4].linear.weight.data[:, :16]
    else:
        weight.data = weight.data.view(torch.int32)
    assert weight.data_ptr() == at and not other.is_current()
    plain = Transformer()
    wanted = plain.blocks[3].linear.weight.data
    if change == "strides":
        plain.blocks[3].linear.weight.data = wanted.t()
        assert torch.equal(model(X), plain(X))
    elif change == "shape":
        assert model(X).shape == (3, 32)
    else:
        other.pack()
        assert torch.equal(weight, wanted.view(torch.int32))


@torch.no_grad()
def test_the_memory_format_of_convolutions_is_kept() -> None:
    unet, inputs = tiny_unet().eval().to(memory_format=torch.channels_last), unet_inputs()
    strides = [tensor.stride() for tensor in tensors_of(unet)]
    expected, seen = unet(*inputs).sample, []
    stream_module(unet, CPU, largest=1)
    convolution = unet.down_blocks[0].resnets[0].conv1
    convolution.register_forward_pre_hook(lambda layer, _: seen.append(layer.weight.stride()))
    for _ in range(2):
        assert torch.equal(unet(*inputs).sample, expected)
    assert seen == [torch.empty(convolution.weight.shape).to(memory_format=torch.channels_last).stride()] * 2
    assert [tensor.stride() for tensor in tensors_of(unet)] == strides
    stop_streaming(unet)
    assert [tensor.stride() for tensor in tensors_of(unet)] == strides


@torch.no_grad()
def test_adapters_come_and_go_while_a_unet_is_streamed() -> None:
    # Without gradients from the start, as an adapter leaves it: torch.matmul folds batches only where there are some,
    # and the two ways round differently.
    unet, inputs = tiny_unet().eval().requires_grad_(False), unet_inputs()
    plain = unet(*inputs).sample
    stream_module(unet, CPU, largest=1)
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "proj_in"], init_lora_weights=False))
    adapted = unet(*inputs).sample
    assert not torch.equal(adapted, plain)
    stop_streaming(unet)
    assert torch.equal(unet(*inputs).sample, adapted)
    stream_module(unet, CPU, largest=1)
    unet.disable_adapters()
    assert torch.equal(unet(*inputs).sample, plain)


def test_a_weight_that_several_have_stays_on_the_device() -> None:
    model = Transformer().eval().requires_grad_(False)
    model.blocks[4].linear.weight = model.blocks[1].linear.weight
    model.blocks[2].linear.bias = nn.Parameter(torch.ones(32), requires_grad=False)
    model.head = nn.Linear(32, 32)
    model.head.bias = model.blocks[2].linear.bias
    model.requires_grad_(False)
    expected = model(X)
    stream = stream_module(model, CPU)
    assert torch.equal(model(X), expected)
    assert [len(copy.places) for copy in stream.copies] == [3, 2, 2, 3, 2, 3]


ERRORS = [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError]


@pytest.mark.parametrize("error", ERRORS)
def test_a_call_that_fails_leaves_a_model_that_works(transformer: Transformer, error: type[BaseException]) -> None:
    expected = transformer(X)

    def fail(*_: object) -> None:
        raise error

    stream_module(transformer, CPU)
    for number in (0, 3, 5):
        at_rest = [tensor.data_ptr() for tensor in tensors_of(transformer)]
        handle = transformer.blocks[number].linear.register_forward_hook(fail)
        with pytest.raises(error):
            transformer(X)
        assert [tensor.data_ptr() for tensor in tensors_of(transformer)] == at_rest
        handle.remove()
        assert torch.equal(transformer(X), expected)
        handle = transformer.blocks[number].linear.register_forward_hook(fail)
        with pytest.raises(error):
            transformer(X)
        handle.remove()
        stop_streaming(transformer)
        assert torch.equal(transformer(X), expected)
        stream_module(transformer, CPU)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("method", ["fill", "attach", "detach", "pack"])
def test_an_error_in_the_streaming_itself_loses_no_weight(
    transformer: Transformer, monkeypatch: pytest.MonkeyPatch, method: str, error: type[BaseException]
) -> None:
    """Ctrl-C in the middle of a copy, or no memory for it: each in the block after the next."""
    expected = transformer(X) + 0
    stream = stream_module(transformer, CPU)
    if method == "pack":
        for block in transformer.blocks:  # they lie elsewhere now, with the same values
            block.linear.weight.data = block.linear.weight.data.clone()
    own, calls = getattr(HostCopy, method), iter(range(100))

    def fail(self: HostCopy, *args: object) -> None:
        if next(calls) == 2:
            raise error
        own(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(HostCopy, method, fail)
        with pytest.raises(error):
            transformer(X)
    if method != "detach":  # in the midst of which its weights cannot be anywhere else
        assert stream.attached is None and not any(slot.block for slot in stream.buffers.slots)
    assert torch.equal(transformer(X), expected)
    assert stream.attached is None and all(copy.is_current() for copy in stream.copies)


def test_a_loan_ends_with_the_call_that_fails(transformer: Transformer) -> None:
    expected = transformer(X)
    loan = lend_module(transformer, CPU)
    at_rest = [tensor.data_ptr() for tensor in tensors_of(transformer)]
    for error in ERRORS:

        def fail(*_: object, error: type[BaseException] = error) -> None:
            raise error

        handle = transformer.blocks[3].register_forward_hook(fail)
        with pytest.raises(error):
            transformer(X)
        handle.remove()
        assert loan.buffer is None and [tensor.data_ptr() for tensor in tensors_of(transformer)] == at_rest
        assert torch.equal(transformer(X), expected)
    stop_streaming(transformer)
    assert torch.equal(transformer(X), expected)


def fork() -> int:
    """`os.fork` with a child that does not outlive a wait that never ends."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # of which the test run may have made an exception
        signal.alarm(30)
    return child


@pytest.mark.parametrize("in_a_call", [False, True])
def test_a_forked_process_streams_with_a_thread_of_its_own(transformer: Transformer, in_a_call: bool) -> None:
    expected = transformer(X)
    stream_module(transformer, CPU)
    transformer(X)
    children: list[int] = []
    if in_a_call:
        transformer.blocks[2].linear.register_forward_hook(lambda *_: children.append(fork()))
        is_right = torch.equal(transformer(X), expected)
    else:
        children.append(fork())
        is_right = all(torch.equal(transformer(X), expected) for _ in range(2))
    if children[0] == 0:
        os._exit(0 if is_right else 1)  # pytest goes on in the parent only
    _, status = os.waitpid(children[0], 0)
    assert is_right and os.waitstatus_to_exitcode(status) == 0


def test_weights_come_from_a_mapped_file(transformer: Transformer, tmp_path: Path) -> None:
    expected = transformer(X)
    save_file(transformer.state_dict(), tmp_path / "model.safetensors")
    transformer.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    stream_module(transformer, CPU, is_mapped=True)
    pointers = [parameter.data_ptr() for parameter in transformer.blocks.parameters()]
    for _ in range(2):
        assert torch.equal(transformer(X), expected)
    assert [parameter.data_ptr() for parameter in transformer.blocks.parameters()] == pointers, "no second copy"


def test_models_share_buffers_and_one_is_lent() -> None:
    first, second, third = Transformer(3, 32).eval(), Transformer(4, 48).eval(), Transformer(2, 16).eval()
    with torch.no_grad():
        expected = [model(X) for model in (first, second, third)]
        buffers = Buffers(CPU)
        stream_module(first, CPU, buffers)
        stream_module(second, CPU, buffers)
        loan = lend_module(third, CPU)
        for _ in range(2):
            assert all(torch.equal(model(X), y) for model, y in zip((first, second, third), expected, strict=True))
    assert loan.statistics.loads == 2 and loan.buffer is None
    for model in (first, second, third):
        stop_streaming(model)
        stop_streaming(model)
        assert not hasattr(model, "_hf_hook")


def test_a_pipeline_draws_the_same_picture_when_all_its_models_are_streamed(tiny_sd: StableDiffusionPipeline) -> None:
    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return tiny_sd("a cat", num_inference_steps=3, generator=generator, output_type="pt", cache_interval=2).images

    expected, buffers = draw(), Buffers(CPU)
    for module in (tiny_sd.unet, tiny_sd.vae.decoder, tiny_sd.vae.encoder):
        stream_module(module, CPU, buffers)
    lend_module(tiny_sd.text_encoder, CPU)
    for _ in range(2):
        assert torch.equal(draw(), expected)
    tiny_sd.remove_all_hooks()
    assert torch.equal(draw(), expected)


def test_what_cannot_be_streamed_is_refused(transformer: Transformer) -> None:
    with pytest.raises(ValueError, match="Linear has no lists of modules, so no blocks"):
        stream_module(nn.Linear(1, 1), CPU)
    stream_module(transformer, CPU)
    for again in (stream_module, lend_module):
        with pytest.raises(ValueError, match="hooks of accelerate move Transformer already"):
            again(transformer, CPU)
    transformer.requires_grad_(True)
    with pytest.raises(RuntimeError, match="Transformer is streamed: its weights are gone before a backward pass"):
        transformer(X)
    with torch.no_grad():
        transformer(X)
