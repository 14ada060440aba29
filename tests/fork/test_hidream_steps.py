"""What HiDream's transformer computes once: padding as one token of its weight, texts and positions for all steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import HiDreamImageTransformer2DModel
from diffusers.pipelines.hidream_image.step_arguments import StepArguments
from peft import LoraConfig

from tests.tiny_hidream import make_transformer

HEIGHT, WIDTH = 6, 20  # of latents: 30 tokens, of the 128 of make_transformer


def texts(transformer: HiDreamImageTransformer2DModel, batch: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((batch, 5, 24), (2, batch, 5, 20), (batch, 64))
    return tuple(torch.randn(shape, generator=generator).to(transformer.dtype) for shape in shapes)


def arguments(transformer: HiDreamImageTransformer2DModel, height: int = HEIGHT, width: int = WIDTH) -> dict[str, Any]:
    t5, llama3, pooled = texts(transformer)
    latents = torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(0)).to(transformer.dtype)
    return {
        "hidden_states": latents,
        "timesteps": torch.tensor([500, 500]),
        "encoder_hidden_states_t5": t5,
        "encoder_hidden_states_llama3": llama3,
        "pooled_embeds": pooled,
        "return_dict": False,
    }


def padded(transformer: HiDreamImageTransformer2DModel, given: dict[str, Any]) -> dict[str, Any]:
    """The same call, patched and padded by the caller."""
    latents = given["hidden_states"]
    rows, columns = latents.shape[2] // 2, latents.shape[3] // 2
    tokens = latents.unflatten(2, (rows, 2)).unflatten(4, (columns, 2)).permute(0, 2, 4, 3, 5, 1).reshape(2, -1, 16)
    rest = transformer.max_seq - rows * columns
    ids = torch.stack(
        torch.meshgrid(torch.zeros(1), *(torch.arange(float(n)) for n in (rows, columns)), indexing="ij"), dim=-1
    )
    ids = torch.cat([ids.reshape(-1, 3), torch.zeros(rest, 3)])[None].expand(2, -1, -1)
    return given | {
        "hidden_states": torch.cat([tokens, tokens.new_zeros(2, rest, 16)], dim=1),
        "hidden_states_masks": torch.cat([tokens.new_ones(2, rows * columns), tokens.new_zeros(2, rest)], dim=1),
        "img_ids": ids,
        "img_sizes": [(rows, columns)] * 2,
    }


# Sums in another order, of as many digits as the dtype has; 16 bits round the weight's logarithm only in its digits.
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 2e-6), (torch.float64, 1e-13), (torch.bfloat16, 5e-2), (torch.float16, 3e-3)],
)
@torch.no_grad()
def test_one_token_stands_for_all_padding(dtype: torch.dtype, tolerance: float) -> None:
    transformer = make_transformer().to(dtype)
    given = arguments(transformer)
    (result,), (expected,) = transformer(**given), transformer(**padded(transformer, given))
    error = (result - expected).norm() / expected.norm()
    assert error < tolerance
    transformer.max_seq = HEIGHT * WIDTH // 4  # without padding the result is quite another
    assert (transformer(**given)[0] - expected).norm() / expected.norm() > 2 * tolerance


@torch.no_grad()
def test_padding_costs_one_token() -> None:
    transformer = make_transformer()
    seen: list[int] = []
    block = transformer.double_stream_blocks[0]
    block.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    for height, width in ((HEIGHT, WIDTH), (8, 8), (16, 32)):  # padded, square, and exactly max_seq
        transformer(**arguments(transformer, height, width))
    assert seen == [HEIGHT * WIDTH // 4 + 1, 16, 128]


def test_latents_beyond_max_seq_are_an_error() -> None:
    transformer = make_transformer()
    with pytest.raises(ValueError, match="200 tokens, and this transformer pads to 128"):
        transformer(**arguments(transformer, 20, 40))


def test_results_of_training_have_their_padding() -> None:
    transformer = make_transformer().train()
    transformer.register_to_config(force_inference_output=False)
    for module in transformer.modules():
        if hasattr(module, "_force_inference_output"):
            module._force_inference_output = False
    (result,) = transformer(**arguments(transformer))
    assert result.shape == (2, 4, transformer.max_seq, 4)


@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (8, 8)], ids=str)
@torch.no_grad()
def test_what_is_made_once_changes_nothing(size: tuple[int, int]) -> None:
    transformer = make_transformer()
    given = arguments(transformer, *size)
    (expected,) = transformer(**given)
    embeds = tuple(
        given.pop(name) for name in ("encoder_hidden_states_t5", "encoder_hidden_states_llama3", "pooled_embeds")
    )
    step_arguments = StepArguments()
    made = step_arguments(transformer, embeds, given["hidden_states"])
    assert made["captions_are_projected"]
    assert torch.equal(transformer(**given, **made)[0], expected)
    calls: list[int] = []
    transformer.caption_projection[0].forward, original = (
        lambda _: calls.append(1),
        transformer.caption_projection[0].forward,
    )
    again = step_arguments(transformer, embeds, given["hidden_states"])
    assert again["encoder_hidden_states_t5"] is made["encoder_hidden_states_t5"] and not calls
    # a replaced forward may look at the texts: it is given them
    other = step_arguments(transformer, embeds, given["hidden_states"], epoch=1)
    assert other["encoder_hidden_states_t5"] is embeds[0] and "captions_are_projected" not in other
    transformer.caption_projection[0].forward = original


@torch.no_grad()
def test_what_is_made_once_is_made_again_for_other_texts_sizes_and_weights() -> None:
    transformer, other = make_transformer(), make_transformer(seed=1)
    given = arguments(transformer)
    latents, embeds = given["hidden_states"], texts(transformer)
    step_arguments = StepArguments()

    def made(model: HiDreamImageTransformer2DModel = transformer, size: int = WIDTH, epoch: int = 0) -> Any:
        return step_arguments(model, embeds, latents[..., :size], epoch)["encoder_hidden_states_t5"]

    first = made()
    assert made() is first
    for change in ({"model": other}, {"size": 8}, {"epoch": 1}):
        assert made(**change) is not first
    first = made()
    embeds[0].mul_(2)  # in place, as a callback may
    assert not torch.equal(made(), first)


@torch.no_grad()
def test_the_residual_stream_in_float32_holds_more_than_float16() -> None:
    transformer = make_transformer().half()
    given = arguments(transformer)
    transformer.x_embedder.proj.bias.fill_(60000)
    transformer.double_stream_blocks[0].block.adaLN_modulation[1].bias[5 * 32 : 6 * 32] = 1000  # of the feed-forward
    assert not transformer(**given)[0].isfinite().all()
    seen: list[torch.dtype] = []
    for block in (transformer.double_stream_blocks[0], transformer.single_stream_blocks[-1]):
        block.register_forward_pre_hook(
            lambda _, __, kwargs: seen.append(kwargs["hidden_states"].dtype), with_kwargs=True
        )
    transformer.residual_dtype = torch.float32
    (result,) = transformer(**given)
    assert seen == [torch.float32] * 2
    assert result.dtype == torch.float16 and result.isfinite().all()


@torch.no_grad()
def test_adapters_on_captions_keep_their_scale() -> None:
    transformer = make_transformer()
    transformer.add_adapter(
        LoraConfig(r=2, target_modules=r"caption_projection\.\d+\.linear", init_lora_weights=False)
    )
    latents, embeds = arguments(transformer)["hidden_states"], texts(transformer)
    made = StepArguments()(transformer, embeds, latents)
    assert "captions_are_projected" not in made and made["encoder_hidden_states_t5"] is embeds[0]


@torch.inference_mode()
def test_a_callback_under_inference_mode_is_seen() -> None:
    transformer = make_transformer()
    latents, embeds = arguments(transformer)["hidden_states"], texts(transformer)
    step_arguments = StepArguments(has_callback=True)
    first = step_arguments(transformer, embeds, latents)["encoder_hidden_states_t5"]
    embeds[0].mul_(2)
    assert not torch.equal(step_arguments(transformer, embeds, latents)["encoder_hidden_states_t5"], first)
