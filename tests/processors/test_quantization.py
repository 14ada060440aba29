"""`quantize_weights` over pipelines: what it covers, what it leaves, and that all other switches still work."""

from __future__ import annotations

import gc
import itertools
import re
import weakref
from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from torch import nn

from processors import (
    dequantize_weights,
    disable_fused_kernels,
    disable_token_merging,
    enable_fused_kernels,
    enable_token_merging,
    load_quantized,
    quantize_weights,
    save_quantized,
)
from processors.kernels.quantized import QuantizedLinear
from tests.tiny_models import CROSS_ATTENTION_DIM

HALVES = (torch.float16, torch.bfloat16)


@torch.no_grad()
def noise(unet: UNet2DConditionModel, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, generator=generator).to(dtype)
    text = torch.randn(2, 77, CROSS_ATTENTION_DIM, generator=generator).to(dtype)
    return unet(latents, torch.tensor(10), text).sample


def quantized(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def bytes_of(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def test_a_pipeline_draws_nearly_the_same_from_fewer_bytes(tiny_sd: StableDiffusionPipeline) -> None:
    expected, before = noise(tiny_sd.unet), bytes_of(tiny_sd.unet)
    report = quantize_weights(tiny_sd)
    assert 0 < error(noise(tiny_sd.unet), expected) < 0.02
    done = re.fullmatch(r"(\d+) Linear layers: ([\d,]+) to ([\d,]+) bytes; not covered: (.+)", report["unet"])
    assert done is not None
    number, fat, slim = (int(text.replace(",", "")) for text in done.groups()[:3])
    assert number == len(quantized(tiny_sd.unet)) > 20
    assert before - bytes_of(tiny_sd.unet) == fat - slim
    assert fat / 4 < slim < fat * 0.28  # float32 to int8, and a scale a channel
    assert "2 Linear outside the blocks (time_embedding)" in done[4]
    assert "Conv2d" in done[4] and "Linear with under 4096 weights" in done[4]
    assert report["vae"].startswith("not covered: ")
    assert tiny_sd.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_takes_half_the_bytes(tiny_sd: StableDiffusionPipeline, dtype: torch.dtype) -> None:
    expected = noise(tiny_sd.unet)
    tiny_sd.to(dtype)
    report = quantize_weights(tiny_sd)["unet"]
    fat, slim = (int(text.replace(",", "")) for text in re.findall(r"([\d,]+) (?:to|bytes)", report))
    assert fat / 2 < slim < fat * 0.53
    assert error(noise(tiny_sd.unet, dtype), expected) < {torch.float16: 0.02, torch.bfloat16: 0.05}[dtype]
    assert tiny_sd.unet.dtype == dtype and {layer.scale.dtype for layer in quantized(tiny_sd.unet).values()} == {dtype}


def test_the_float_weights_are_gone(tiny_sd: StableDiffusionPipeline) -> None:
    modules = dict(tiny_sd.unet.named_modules())
    weights = {name: weakref.ref(m.weight) for name, m in modules.items() if isinstance(m, nn.Linear)}
    del modules
    quantize_weights(tiny_sd)
    noise(tiny_sd.unet)
    gc.collect()
    names = quantized(tiny_sd.unet)
    assert names and not [name for name in names if weights[name]() is not None]


def test_it_may_be_called_again_and_undone(tiny_sd: StableDiffusionPipeline) -> None:
    dequantize_weights(tiny_sd)  # does nothing
    names = sorted(tiny_sd.unet.state_dict())
    report = quantize_weights(tiny_sd)
    expected, weights = noise(tiny_sd.unet), {n: layer.weight for n, layer in quantized(tiny_sd.unet).items()}
    assert quantize_weights(tiny_sd) == report
    assert all(layer.weight is weights[name] for name, layer in quantized(tiny_sd.unet).items())
    dequantize_weights(tiny_sd)
    assert not quantized(tiny_sd.unet) and sorted(tiny_sd.unet.state_dict()) == names
    assert torch.equal(noise(tiny_sd.unet), expected)


SWITCHES: dict[str, Callable[[StableDiffusionPipeline], object]] = {
    "int8": quantize_weights,
    "fused": enable_fused_kernels,
    "merging": lambda pipe: enable_token_merging(pipe, ratio=0.25),
}


def test_the_order_of_the_switches_does_not_matter(tiny_sd: StableDiffusionPipeline) -> None:
    results = []
    quantize_weights(tiny_sd)
    dequantize_weights(tiny_sd)  # so that each order starts from weights that lie on steps
    for order in itertools.permutations(SWITCHES):
        for name in order:
            SWITCHES[name](tiny_sd)
        results.append(noise(tiny_sd.unet))
        disable_token_merging(tiny_sd)
        dequantize_weights(tiny_sd)
        disable_fused_kernels(tiny_sd)
    for result in results[1:]:
        close(result, results[0])


def add_adapter(unet: UNet2DConditionModel) -> None:
    config = LoraConfig(r=64, lora_alpha=64, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"])
    torch.manual_seed(1)
    unet.add_adapter(config)


@pytest.mark.parametrize("first", ("adapter", "int8"))
def test_adapters_go_on_top_in_either_order(tiny_sd: StableDiffusionPipeline, first: str) -> None:
    unet = tiny_sd.unet
    quantize_weights(unet)
    dequantize_weights(unet)  # weights that lie on steps, so that quantising adds no error
    plain = noise(unet)
    add_adapter(unet)
    expected = noise(unet)
    assert error(expected, plain) > 0.05
    if first == "int8":
        unet.delete_adapters("default")
        quantize_weights(unet)
        add_adapter(unet)
        report = quantize_weights(unet)
    else:
        report = quantize_weights(unet)
    close(noise(unet), expected)
    assert "Linear of adapters" in next(iter(report.values()))
    assert not any("lora_" in name for name in quantized(unet))
    assert any(name.endswith("to_q.base_layer") for name in quantized(unet))
    unet.disable_adapters()
    close(noise(unet), plain)


def test_what_would_need_the_float_weights_is_an_error(tiny_sd: StableDiffusionPipeline) -> None:
    quantize_weights(tiny_sd)
    add_adapter(tiny_sd.unet)
    before = noise(tiny_sd.unet)
    with pytest.raises(RuntimeError, match="can't be cast to the desired output type Char"):
        tiny_sd.unet.fuse_lora()
    close(noise(tiny_sd.unet), before)
    tiny_sd.unet.delete_adapters("default")
    with pytest.raises(RuntimeError):
        tiny_sd.unet.fuse_qkv_projections()


def test_saved_weights_are_read_without_float_ones(tiny_sd: StableDiffusionPipeline, tmp_path: Path) -> None:
    unet, path = tiny_sd.unet.half(), tmp_path / "unet.safetensors"
    quantize_weights(unet)
    save_quantized(unet, path)
    assert [file.name for file in tmp_path.iterdir()] == ["unet.safetensors"]
    assert path.stat().st_size < bytes_of(unet) + 2**17  # and a header
    with accelerate.init_empty_weights():
        empty = UNet2DConditionModel.from_config(unet.config)
    again = load_quantized(empty, path)
    assert again is empty and not any(tensor.is_meta for tensor in again.state_dict().values())
    assert quantized(again).keys() == quantized(unet).keys()
    for name, tensor in unet.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert torch.equal(noise(again.eval(), torch.float16), noise(unet, torch.float16))
    with pytest.raises(RuntimeError, match="Missing key"):
        load_quantized(tiny_sd.vae, path)


class Several(nn.Module):
    """A layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(64, 64) for _ in range(3)])
        self.wide = nn.ModuleList([nn.Linear(64, 64).double(), nn.Linear(64, 64)])
        self.attention = nn.ModuleList([nn.MultiheadAttention(64, 4)])
        self.tied = nn.ModuleList([nn.Embedding(64, 64), nn.Linear(64, 64, bias=False)])
        self.tied[1].weight = self.tied[0].weight
        self.last = nn.Linear(64, 64)


def test_layers_that_stay_say_why() -> None:
    model = Several()
    assert quantize_weights(model) == {
        "Several": "4 Linear layers: 65,536 to 17,408 bytes; not covered: 1 Linear in float64, "
        "1 Linear outside the blocks (last), 1 Linear with a shared weight, 1 NonDynamicallyQuantizableLinear"
    }
    assert quantized(model).keys() == {"blocks.0", "blocks.1", "blocks.2", "wide.1"}


def test_a_model_without_blocks_and_a_single_layer_are_quantised_whole() -> None:
    assert quantize_weights(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))) == {
        "Sequential": "2 Linear layers: 32,768 to 8,704 bytes"
    }
    assert quantize_weights(nn.Linear(64, 64)) == {"Linear": "1 Linear layer: 16,384 to 4,352 bytes"}


def offloaded() -> nn.Module:
    return accelerate.cpu_offload(nn.Sequential(nn.Linear(64, 64)), torch.device("cpu"))


def damaged() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight.data[3, 5] = torch.nan
    return model


@pytest.mark.parametrize(
    "model, arguments, message",
    [
        (lambda: nn.Linear(64, 64), {"bits": 4}, "weights of 4 bits"),
        (lambda: nn.Conv2d(4, 4, 3), {}, r"no Linear layer of Conv2d .* \(Conv2d: not covered: 1 Conv2d\)"),
        (nn.ReLU, {}, "it has no Linear layer"),
        (offloaded, {}, r"Sequential\.0 is offloaded"),
        (damaged, {}, r"Sequential\.1\.weight has values that are not finite"),
    ],
)
def test_what_cannot_be_quantised_stays_as_it_was(
    model: Callable[[], nn.Module], arguments: dict[str, int], message: str
) -> None:
    module = model()
    with pytest.raises(ValueError, match=message):
        quantize_weights(module, **arguments)
    assert not quantized(module)


def test_something_else_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a pipeline of diffusers or a model, got int"):
        quantize_weights(3)
