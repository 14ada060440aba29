"""Streamed models on the chip: the resident model's results to the bit, in two blocks and what is around them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from ascend.streaming import Buffers, find_blocks, lend_module, stop_streaming, stream_module
from ascend.streaming.blocks import aligned, bytes_of
from processors import enable_fused_kernels
from tests.ascend.streaming.test_stream import Transformer
from tests.fork.test_npu_guards import tiny_hidream
from tests.programs import ROOT
from tests.tiny_models import CROSS_ATTENTION_DIM, tiny_unet

HALF = torch.float16


def make_transformer() -> Transformer:
    return Transformer(blocks=8, width=512).eval().requires_grad_(False).to(HALF)


X = torch.linspace(-1, 1, 12, dtype=HALF).view(3, 4)


@pytest.mark.parametrize("is_mapped", [False, True])
def test_peak_memory_is_two_blocks_and_what_is_around_them(npu: torch.device, tmp_path: Path, is_mapped: bool) -> None:
    x = X.to(npu)
    resident = make_transformer().to(npu)
    expected = resident(x)
    del resident
    model = make_transformer()
    if is_mapped:
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        model.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    torch.npu.empty_cache()
    before = torch.npu.memory_allocated(npu)
    torch.npu.reset_peak_memory_stats(npu)
    stream = stream_module(model, npu, is_mapped=is_mapped)
    for _ in range(3):
        assert torch.equal(model(x), expected)
    block, around = bytes_of(model.blocks[0]), bytes_of(model.embed)
    activations = 8 * aligned(3 * 512 * 2)
    peak = torch.npu.max_memory_allocated(npu) - before
    assert 2 * block + around <= peak <= 2 * block + around + activations
    stop_streaming(model)
    stream.buffers.drop()
    assert torch.npu.memory_allocated(npu) == before
    assert next(model.parameters()).device.type == "cpu"


@torch.no_grad()
def test_a_streamed_unet_is_the_resident_one(npu: torch.device) -> None:
    torch.manual_seed(1)
    inputs = [torch.randn(2, 4, 16, 16), torch.tensor(10), torch.randn(2, 7, CROSS_ATTENTION_DIM)]
    inputs = [x.to(npu, HALF) if x.is_floating_point() else x.to(npu) for x in inputs]
    unet = tiny_unet().eval().to(npu, HALF)
    enable_fused_kernels(unet)
    expected = unet(*inputs).sample
    stream_module(unet, npu, largest=1)
    for _ in range(2):
        assert torch.equal(unet(*inputs).sample, expected)


def test_a_pipeline_is_drawn_with_models_that_take_turns(npu: torch.device, tiny_sd: StableDiffusionPipeline) -> None:
    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        size = {"height": 64, "width": 64, "num_inference_steps": 3, "cache_interval": 2}
        return tiny_sd("a cat", generator=generator, output_type="pt", **size).images

    tiny_sd.to(npu, HALF)
    enable_fused_kernels(tiny_sd)
    expected, buffers = draw(), Buffers(npu)
    tiny_sd.to("cpu")
    for module in (tiny_sd.unet, tiny_sd.vae.decoder, tiny_sd.vae.encoder):
        stream_module(module, npu, buffers)
    tiny_sd.vae.post_quant_conv.to(npu)
    lend_module(tiny_sd.text_encoder, npu)
    for _ in range(2):
        assert torch.equal(draw(), expected)


@pytest.mark.parametrize("is_mapped", [False, True])
@pytest.mark.parametrize("keeps", [False, True])
@torch.no_grad()
def test_a_streamed_hidream_is_the_resident_one(
    npu: torch.device, tmp_path: Path, is_mapped: bool, keeps: bool
) -> None:
    """Its double and single blocks are of two sizes, and hold experts."""
    model, generator = tiny_hidream().to(HALF), torch.Generator().manual_seed(0)
    shapes = {
        "hidden_states": (1, 4, 32, 32),
        "encoder_hidden_states_t5": (1, 8, 32),
        "encoder_hidden_states_llama3": (2, 1, 8, 16),
        "pooled_embeds": (1, 64),
    }
    inputs = {name: torch.randn(shape, generator=generator).to(npu, HALF) for name, shape in shapes.items()}
    inputs["timesteps"] = torch.tensor([500.0], device=npu)
    expected = model.to(npu)(**inputs).sample
    model.to("cpu")
    if is_mapped:
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        model.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    kept = list(find_blocks(model))[::2] if keeps else []
    stream = stream_module(model, npu, is_mapped=is_mapped, kept=kept)
    for _ in range(2):
        assert torch.equal(model(**inputs).sample, expected)
    assert stream.statistics.loads >= 2 * (len(find_blocks(model)) - len(kept))
    assert all(tensor.device == npu for block in stream.kept for tensor in block.module.parameters())
    if keeps:  # an adapter that comes later is with the host at first
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        adapted = model(**inputs).sample
        assert not torch.equal(adapted, expected)
        stop_streaming(model)
        assert torch.equal(model.to(npu)(**inputs).sample, adapted)


FORK = """
import os, sys, torch
from ascend.device import DeviceManager
from ascend.streaming import stream_module
from tests.on_npu.test_streaming import X, make_transformer

device = DeviceManager("npu").device
model, x = make_transformer(), X.to(device)
stream_module(model, device)
expected = model(x)
child = os.fork()
if child == 0:
    if sys.argv[1] == "use":
        try:
            model(x)
        except RuntimeError as error:
            os._exit(3 if "was forked from one that streams to npu" in str(error) else 4)
    os._exit(0)
_, status = os.waitpid(child, 0)
assert torch.equal(model(x), expected)
print("child", os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize(("does", "code"), [("nothing", 0), ("use", 3)])
def test_a_forked_process_is_told_that_the_chip_is_not_its_own(npu: torch.device, does: str, code: int) -> None:
    command = [sys.executable, "-c", FORK, does]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout.split() == ["child", str(code)], result.stderr


def test_no_block_waits_for_the_device(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make_transformer(), X.to(npu)
    stream_module(model, npu)
    model(x)
    waits: list[str] = []
    for owner in (torch.npu.Stream, torch.npu.Event):
        monkeypatch.setattr(owner, "synchronize", lambda self: waits.append(type(self).__name__))
    monkeypatch.setattr(torch.npu, "synchronize", lambda *_: waits.append("device"))
    model(x)
    assert not waits
