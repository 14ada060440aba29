"""HiDream's mixtures of experts with stacked weights: upstream's results, choices and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HiDreamImageTransformer2DModel
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from peft import LoHaConfig

from processors import disable_fused_kernels, enable_fused_kernels, quantize_weights
from processors.kernels.experts import dense, expert_feed_forward, route
from processors.models.hidream import FusedMoE, fuse, unfuse
from tests.tiny_hidream import make_transformer


def make_moe(dtype: torch.dtype = torch.float32) -> MOEFeedForwardSwiGLU:
    torch.manual_seed(0)
    return MOEFeedForwardSwiGLU(32, 128, 4, 2, _force_inference_output=True).to(dtype).eval()


def predict(
    model: HiDreamImageTransformer2DModel,
    width: int = 16,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Of a latent of 8 times `width`, which is padded unless it is square."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    with torch.no_grad():
        return model(
            hidden_states=noise(2, 4, 8, width),
            timesteps=torch.tensor([500, 500]).to(device),
            encoder_hidden_states_t5=noise(2, 6, 24),
            encoder_hidden_states_llama3=noise(2, 2, 6, 20),
            pooled_embeds=noise(2, 64),
        ).sample


def test_rows_are_in_the_order_of_their_experts() -> None:
    indices = torch.tensor([[2, 0], [0, 3], [3, 2], [0, 2]])  # nobody wants expert 1
    tokens, places, ends = route(indices, 4)
    assert ends.tolist() == [3, 3, 6, 8]
    assert tokens.tolist() == [0, 1, 3, 0, 2, 3, 1, 2]
    experts = torch.arange(4).repeat_interleave(torch.diff(ends, prepend=torch.tensor([0])))
    assert torch.equal(experts[places], indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_experts_compute_what_upstream_computes(dtype: torch.dtype) -> None:
    moe = make_moe(dtype)
    x = torch.randn(2, 37, 32, dtype=dtype)
    with torch.no_grad():
        expected = moe(x)
        fuse(moe)
        if dtype == torch.float64:  # which has no grouped product
            assert torch.allclose(moe(x), expected, atol=1e-12)
        else:
            assert torch.equal(moe(x), expected)
        indices, weights, _ = moe.gate(x)
        experts: Any = moe.experts
        everything = dense(x.view(-1, 32), indices, weights, experts.gate_up, experts.down) + moe.shared_experts(
            x
        ).view(-1, 32)
        tolerance = 1e-6 if dtype == torch.float32 else 1e-12 if dtype == torch.float64 else 0.02
        assert torch.allclose(everything, expected.view(-1, 32), atol=tolerance)
        unfuse(moe)
        assert torch.equal(moe(x), expected) and type(moe) is MOEFeedForwardSwiGLU


def test_gradients_are_those_of_the_modules() -> None:
    moe = make_moe()
    moe._force_inference_output = False
    moe.train()
    x = torch.randn(1, 20, 32, requires_grad=True)
    moe(x).square().sum().backward()
    expected = x.grad, moe.gate.weight.grad, moe.experts[1].w3.weight.grad
    assert x.grad is not None and expected[2] is not None
    x.grad = moe.gate.weight.grad = None
    fuse(moe)
    moe(x).square().sum().backward()
    experts: Any = moe.experts
    hidden = experts.down.shape[2]
    for found, wanted in zip((x.grad, moe.gate.weight.grad, experts.gate_up.grad[1, hidden:]), expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)


def test_shapes_depend_on_no_values() -> None:
    """What a graph needs: one for all routings, without a break."""
    moe = make_moe()
    fuse(moe)
    experts: Any = moe.experts
    compiled = torch.compile(expert_feed_forward, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        x = torch.randn(20, 32, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            indices, weights, _ = moe.gate(x[None])
            arguments = (x, indices, weights, experts.gate_up, experts.down)
            assert torch.allclose(compiled(*arguments), expert_feed_forward(*arguments), atol=1e-6)


@pytest.mark.parametrize("width", [8, 16])
def test_a_transformer_predicts_the_same_to_the_bit(width: int) -> None:
    model = make_transformer()
    expected = predict(model, width)
    report = enable_fused_kernels(model)
    assert report == {"HiDreamImageTransformer2DModel": "3 attentions, 3 mixtures of experts"}
    assert torch.equal(predict(model, width), expected)
    disable_fused_kernels(model)
    assert torch.equal(predict(model, width), expected)
    assert not any(isinstance(module, FusedMoE) for module in model.modules())


def test_checkpoints_are_upstreams(tmp_path: Path) -> None:
    model, other = make_transformer(), make_transformer(seed=5)
    names, expected = list(model.state_dict()), predict(model)
    enable_fused_kernels(model)
    assert sorted(model.state_dict()) == sorted(names)
    model.save_pretrained(tmp_path)
    assert torch.equal(predict(HiDreamImageTransformer2DModel.from_pretrained(tmp_path)), expected)
    enable_fused_kernels(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(predict(other), expected)
    wrong = {name: tensor for name, tensor in model.state_dict().items() if "experts.0.w1" not in name}
    with pytest.raises(RuntimeError, match=r"Missing key.*experts\.0\.w1\.weight"):
        other.load_state_dict(wrong)


def test_what_is_not_plain_is_left_and_said() -> None:
    model = make_transformer()
    model.add_adapter(LoHaConfig(r=2, target_modules=["w1"]))
    (words,) = enable_fused_kernels(model).values()
    assert "not covered: 3 mixtures of experts with other adapters than LoRA, hooks, integer weights" in words
    cast = make_transformer()
    cast.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    expected = predict(cast)
    (words,) = enable_fused_kernels(cast).values()
    assert "not covered: 3 mixtures" in words and torch.equal(predict(cast), expected)
    stacked = make_transformer()
    enable_fused_kernels(stacked)
    (words,) = quantize_weights(stacked).values()
    assert "3 mixture with stacked experts" in words


def test_autocast_computes_as_upstream_does() -> None:
    moe, x = make_moe(), torch.randn(2, 37, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = moe(x)
        fuse(moe)
        found = moe(x)
    assert (found.float() - expected.float()).norm() < 0.02 * expected.float().norm()  # bfloat16
