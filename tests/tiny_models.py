"""Randomly initialised models with the shape of Stable Diffusion 2.1, small enough for a test."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

CROSS_ATTENTION_DIM = 32


def tiny_unet(sample_size: int = 16) -> UNet2DConditionModel:
    """UNet with SD2.1's topology: 4 levels, 2 layers a block, cross-attention but in the deepest, linear projections.

    Input `[batch, 4, sample_size, sample_size]` float32; heads of 8 channels, so 4 to 8 heads by level.
    """
    return UNet2DConditionModel(
        sample_size=sample_size,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=(4, 4, 8, 8),  # diffusers' historical name for the number of heads
        cross_attention_dim=CROSS_ATTENTION_DIM,
        norm_num_groups=8,
        use_linear_projection=True,
    )


def small_unet() -> UNet2DConditionModel:
    """The least that DeepCache, token merging and adapters work on: two levels of a layer, attention in the upper one.

    For tests of what happens around a UNet, which is compiled or computed many times. Input `[batch, 4, 16, 16]`.
    """
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(4, 8),
        cross_attention_dim=CROSS_ATTENTION_DIM,
        norm_num_groups=8,
        use_linear_projection=True,
    )


def tiny_vae(sample_size: int = 128) -> AutoencoderKL:
    """Autoencoder between `[batch, 3, sample_size, sample_size]` and latents 8 times smaller, as SD2.1's."""
    return AutoencoderKL(
        sample_size=sample_size,
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP tokenizer with an empty merge list, so that each character is a token; leaves its files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    characters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    words = characters + [f"{character}</w>" for character in characters] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token="!")


def tiny_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=CROSS_ATTENTION_DIM,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tiny_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def save_tiny_sd(folder: Path, seed: int = 0, make_unet: Callable[[], UNet2DConditionModel] = tiny_unet) -> Path:
    """Save a whole tiny pipeline (128 x 128 pixels) to `folder` and return `folder`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer(folder / "tokenizer")
        pipe = StableDiffusionPipeline(
            vae=tiny_vae(),
            text_encoder=tiny_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=make_unet(),
            scheduler=tiny_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.save_pretrained(folder)
    return folder
