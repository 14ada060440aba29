"""Gradients of whole models on the NPU: those of every trainable tensor are the CPU's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from processors import enable_flash_attention
from tests.on_npu.helpers import SATURATES
from tests.on_npu.inputs import numbers
from tests.tiny_models import CROSS_ATTENTION_DIM, small_unet, tiny_unet, tiny_vae

Loss = Callable[[nn.Module], torch.Tensor]
not_310p = pytest.mark.skipif(SATURATES, reason="310P is made for inference: it has no kernel")
# float32 throughout, with sums in another order: largest difference over the largest gradient of the same tensor, or
# over this share of the largest of all, for tensors whose gradients are 0 but for rounding (the bias of a key).
TOLERANCE = 2e-4
NEGLIGIBLE = 1e-3


@pytest.fixture(autouse=True)
def exact_convolutions(npu: torch.device) -> Iterator[None]:
    """Without HF32, the default of 910B: these gradients are compared in float32."""
    torch.npu.conv.allow_hf32 = False
    yield
    torch.npu.conv.allow_hf32 = True


def unet_loss(unet: nn.Module) -> torch.Tensor:
    device = next(unet.parameters()).device
    noise = numbers((2, 4, 16, 16), torch.float32, seed=1).to(device)
    latents = numbers((2, 4, 16, 16), torch.float32).to(device)
    states = numbers((2, 7, CROSS_ATTENTION_DIM), torch.float32, seed=2).to(device)
    predicted = unet(latents, torch.tensor([3, 700], device=device), states).sample
    return F.mse_loss(predicted, noise)


def vae_loss(vae: nn.Module) -> torch.Tensor:
    device = next(vae.parameters()).device
    images = numbers((1, 3, 32, 32), torch.float32, low=-1, high=1).to(device)
    posterior = vae.encode(images).latent_dist
    return F.l1_loss(vae.decode(posterior.mode()).sample, images) + 1e-2 * posterior.kl().mean()


def text_loss(model: nn.Module) -> torch.Tensor:
    device = next(model.parameters()).device
    ids = torch.randint(2, 99, (2, 9), generator=torch.Generator().manual_seed(0)).to(device)
    states = model(ids).last_hidden_state
    return F.mse_loss(states, numbers(states.shape, torch.float32, seed=1).to(device))


def vision_loss(model: nn.Module) -> torch.Tensor:
    device = next(model.parameters()).device
    states = model(numbers((2, 3, 32, 32), torch.float32).to(device)).pooler_output
    return F.cross_entropy(states, torch.tensor([3, 17], device=device))


def text_model(activation: str = "gelu_pytorch_tanh") -> nn.Module:
    return CLIPTextModel(
        CLIPTextConfig(
            **{"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
            **{"num_attention_heads": 4, "max_position_embeddings": 16, "hidden_act": activation},
            **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
        )
    )


def vision_model() -> nn.Module:
    return CLIPVisionModel(
        CLIPVisionConfig(
            **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"image_size": 32, "patch_size": 8, "hidden_act": "quick_gelu"},
        )
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
    "unet": (tiny_unet, unet_loss),
    "vae": (tiny_vae, vae_loss),
    "text": (text_model, text_loss),
    "vision": (vision_model, vision_loss),
}


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().train()


def gradients(model: nn.Module, loss: Loss) -> dict[str, torch.Tensor]:
    loss(model).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: grad.cpu() for name, grad in found.items() if grad is not None}


def assert_same_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys() and expected
    floor = NEGLIGIBLE * max(grad.abs().max().item() for grad in expected.values())
    wrong = {
        name: difference
        for name, grad in expected.items()
        if not (difference := _difference(actual[name], grad, floor)) <= TOLERANCE  # NaN is wrong too
    }
    assert not wrong


def _difference(actual: torch.Tensor, expected: torch.Tensor, floor: float) -> float:
    return (actual - expected).abs().max().item() / max(expected.abs().max().item(), floor)


@not_310p
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_of_every_trainable_tensor_is_the_cpus(name: str, npu: torch.device) -> None:
    build, loss = MODELS[name]
    expected = gradients(seeded(build), loss)
    assert_same_gradients(gradients(seeded(build).to(npu), loss), expected)


@not_310p
@pytest.mark.parametrize("name", MODELS)
def test_gradients_pass_through_fused_kernels(name: str, npu: torch.device) -> None:
    build, loss = MODELS[name]
    if name == "text":  # the activation of SD2.1, which the chip has as an operator of its own
        build = functools.partial(text_model, "gelu")
    expected = gradients(seeded(build), loss)
    model = seeded(build).to(npu)
    enable_flash_attention(model)
    assert_same_gradients(gradients(model, loss), expected)


@pytest.mark.skipif(not SATURATES, reason="of 310P")
def test_310p_refuses_to_train(npu: torch.device) -> None:
    unet = small_unet().to(npu)
    with pytest.raises(RuntimeError, match="no kernel for this chip"):
        gradients(unet, unet_loss)
