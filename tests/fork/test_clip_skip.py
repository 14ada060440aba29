"""`clip_skip` takes an earlier layer of the text encoder, with transformers' last norm after it."""

import pytest
import torch
from diffusers import (
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from diffusers.models.lora import text_encoder_attn_modules, text_encoder_mlp_modules


@pytest.mark.parametrize(
    "sister",
    [
        StableDiffusionPipeline,
        StableDiffusionImg2ImgPipeline,
        StableDiffusionInpaintPipeline,
        StableDiffusionControlNetPipeline,
    ],
)
@pytest.mark.parametrize("clip_skip", [1, 2])
def test_clip_skip_is_an_earlier_layer_after_the_last_norm(
    tiny_sd: StableDiffusionPipeline, sister: type[StableDiffusionPipeline], clip_skip: int
) -> None:
    tokens = tiny_sd.tokenizer("a cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
    encoder = tiny_sd.text_encoder
    layers = encoder(tokens, output_hidden_states=True).hidden_states
    expected = encoder.final_layer_norm(layers[len(encoder.encoder.layers) - clip_skip])

    # Only the text encoder and the tokenizer have a part in it, whatever else the sister is made of.
    pipe = sister.__new__(sister)
    pipe.register_modules(text_encoder=encoder, tokenizer=tiny_sd.tokenizer, unet=None)
    embeds, _ = pipe.encode_prompt("a cat", torch.device("cpu"), 1, False, clip_skip=clip_skip)
    torch.testing.assert_close(embeds, expected, rtol=0, atol=0)


def test_pictures_with_clip_skip_differ(tiny_sd: StableDiffusionPipeline) -> None:
    plain, skipped = (
        tiny_sd(
            "a cat",
            num_inference_steps=1,
            clip_skip=skip,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images
        for skip in (None, 1)
    )
    assert not torch.equal(plain, skipped)


def test_the_layers_of_a_text_encoder_are_found_by_their_names(tiny_sd: StableDiffusionPipeline) -> None:
    encoder = tiny_sd.text_encoder
    found = text_encoder_attn_modules(encoder) + text_encoder_mlp_modules(encoder)
    assert len(found) == 2 * len(encoder.encoder.layers)
    assert all(encoder.get_submodule(name) is module for name, module in found)
