"""Our processor against diffusers' own, which it must equal bit for bit on the CPU."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from diffusers.models.attention_processor import AttnProcessor2_0 as DefaultAttnProcessor

from processors import AttnProcessor2_0, AttnProcessor2_0Tome

IMAGE = {"query_dim": 32, "residual_connection": True, "norm_num_groups": 4, "heads": 1, "dim_head": 32, "bias": True}


def both(kwargs: dict, *inputs: object, **named: object) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    attn = Attention(**{"query_dim": 16, "heads": 2, "dim_head": 8, **kwargs}).eval()
    with torch.no_grad():
        for parameter in attn.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        outputs = []
        for processor in (DefaultAttnProcessor(), AttnProcessor2_0()):
            attn.set_processor(processor)
            outputs.append(attn(*inputs, **named))
    return outputs[0], outputs[1]


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"bias": True, "out_bias": False},
        {"qk_norm": "layer_norm"},
        {"qk_norm": "rms_norm"},
        {"rescale_output_factor": 2.0},
        {"residual_connection": True},
        {"norm_num_groups": 4},
        {"upcast_attention": True},
        {"out_dim": 24},
    ],
    ids=str,
)
def test_self_attention_is_bit_identical(kwargs: dict) -> None:
    expected, actual = both(kwargs, torch.randn(2, 9, 16))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("norm", [None, "layer_norm", "group_norm"])
def test_cross_attention_is_bit_identical(norm: str | None) -> None:
    kwargs = {"cross_attention_dim": 12, "cross_attention_norm": norm, "cross_attention_norm_num_groups": 3}
    expected, actual = both(kwargs, torch.randn(2, 9, 16), encoder_hidden_states=torch.randn(2, 7, 12))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    "mask",
    [
        torch.randn(2, 1, 7),
        torch.randn(2, 9, 7),
        torch.rand(2, 1, 7) > 0.4,
        torch.rand(4, 9, 7) > 0.4,
        torch.randn(4, 1, 7),
        (1 - torch.tensor([[[1.0] * 5 + [0.0] * 2]] * 2)) * -10000.0,
    ],
    ids=["float of keys", "float", "bool of keys", "bool of each head", "float of each head", "bias of the UNet"],
)
def test_masked_cross_attention_is_bit_identical(mask: torch.Tensor) -> None:
    expected, actual = both(
        {"cross_attention_dim": 12},
        torch.randn(2, 9, 16),
        encoder_hidden_states=torch.randn(2, 7, 12),
        attention_mask=mask,
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    "kwargs", [{}, {"spatial_norm_dim": 6, "norm_num_groups": None}, {"rescale_output_factor": 2.0}]
)
def test_image_attention_of_a_vae_is_bit_identical(kwargs: dict) -> None:
    expected, actual = both(IMAGE | kwargs, torch.randn(2, 32, 6, 5), temb=torch.randn(2, 6, 6, 5))
    assert actual.shape == (2, 32, 6, 5)
    assert torch.equal(actual, expected)


def test_channels_last_image_is_bit_identical() -> None:
    expected, actual = both(IMAGE, torch.randn(2, 32, 4, 4).contiguous(memory_format=torch.channels_last))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("kwargs", "inputs"),
    [
        ({}, {"hidden_states": torch.randn(2, 9, 16)}),
        ({"bias": True, "qk_norm": "layer_norm"}, {"hidden_states": torch.randn(2, 9, 16)}),
        (
            {"cross_attention_dim": 12, "cross_attention_norm": "layer_norm"},
            {"hidden_states": torch.randn(2, 9, 16), "encoder_hidden_states": torch.randn(2, 7, 12)},
        ),
        (IMAGE, {"hidden_states": torch.randn(2, 32, 6, 5)}),
    ],
    ids=["self-attention", "bias and norm", "cross-attention", "image"],
)
@torch.no_grad()
def test_fused_projections_are_bit_identical(kwargs: dict, inputs: dict) -> None:
    torch.manual_seed(0)
    attn = Attention(**{"query_dim": 16, "heads": 2, "dim_head": 8, **kwargs}).eval()
    attn.fuse_projections()
    for layer in (attn.to_q, attn.to_k, attn.to_v):
        if not (attn.is_cross_attention and layer is attn.to_q):
            layer.weight.zero_()  # so that it shows which are used
    attn.set_processor(FusedAttnProcessor2_0())
    expected = attn(**inputs)
    attn.set_processor(AttnProcessor2_0())
    assert torch.equal(attn(**inputs), expected)


def test_promises_to_the_pipeline_are_made_by_the_class_that_keeps_them() -> None:
    """A subclass that overrides the call need not take a projected prompt, which its parent said of itself."""

    class Users(AttnProcessor2_0):
        pass

    assert vars(AttnProcessor2_0)["takes_projected_context"]
    assert "takes_projected_context" not in vars(Users)
    assert not hasattr(AttnProcessor2_0Tome, "takes_projected_context")
