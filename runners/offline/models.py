"""The models that are exported: modules of one input, with examples of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel, PreTrainedModel

from runners.cli import UserError, is_out_of_memory
from runners.clip.checkpoint import image_tower, text_length_of, text_tower
from runners.weight_files import first_line

EXAMPLES = 2  # which a file is compared with its module by


@dataclass(frozen=True)
class Export:
    """One file to be.

    Attributes:
        name: of the file, without its ending.
        input, output: their names.
        make_input: an input of a batch of that size, drawn from the generator.
    """

    name: str
    module: nn.Module
    input: str
    output: str
    make_input: Callable[[int, torch.Generator], Tensor]

    def examples(self, batch_size: int) -> list[dict[str, Tensor]]:
        return [
            {self.input: self.make_input(batch_size, torch.Generator().manual_seed(seed))} for seed in range(EXAMPLES)
        ]


def image_export(model: PreTrainedModel) -> Export:
    """The image tower of a CLIP that was loaded with eager attention."""
    side = model.config.vision_config.image_size

    def make(count: int, generator: torch.Generator) -> Tensor:
        return torch.randn(count, 3, side, side, generator=generator)

    return Export("image_tower", image_tower(model), "pixel_values", "image_features", make)


def text_export(model: PreTrainedModel, length: int) -> Export:
    """The text tower, for texts of `length` tokens."""
    config = model.config.text_config
    longest = text_length_of(model.config)
    if length > longest or (model.config.model_type == "siglip" and length != longest):
        raise UserError(f"--text-length {length}: the model's texts have {longest} tokens")
    return Export("text_tower", text_tower(model), "input_ids", "text_features", token_maker(config, length))


def token_maker(config: Any, length: int) -> Callable[[int, torch.Generator], Tensor]:
    """Token ids that end at another place in each text, where CLIP reads it."""
    vocabulary, end = config.vocab_size, config.eos_token_id

    def make(count: int, generator: torch.Generator) -> Tensor:
        ids = torch.randint(0, vocabulary, (count, length), generator=generator)
        ends = torch.randint(1, length, (count, 1), generator=generator)
        return torch.where(torch.arange(length) >= ends, end, ids)

    return make


class VaeDecoder(nn.Module):
    """Latents as a pipeline has them [count, channels, height, width] to pictures from -1 to 1, 8 times as large."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae, self.scale = vae, 1 / vae.config.scaling_factor

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents * self.scale, return_dict=False)[0]


class TextEncoder(nn.Module):
    """Token ids [count, length] to the states that a UNet attends to [count, length, width]."""

    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.encoder(input_ids).last_hidden_state


def vae_decoder_export(folder: Path, height: int | None, width: int | None) -> Export:
    """Of the pipeline in `folder`, for pictures of that size in pixels; the model's own if None."""
    vae = _load(AutoencoderKL, folder / "vae")
    vae.set_attn_processor(AttnProcessor())
    sides = [(side or vae.config.sample_size) // 8 for side in (height, width)]

    def make(count: int, generator: torch.Generator) -> Tensor:
        return torch.randn(count, vae.config.latent_channels, *sides, generator=generator)

    return Export("vae_decoder", VaeDecoder(vae), "latents", "sample", make)


def text_encoder_export(folder: Path) -> Export:
    """Of the pipeline in `folder`."""
    encoder = _load(CLIPTextModel, folder / "text_encoder", attn_implementation="eager")
    length = encoder.config.max_position_embeddings
    return Export(
        "text_encoder",
        TextEncoder(encoder),
        "input_ids",
        "last_hidden_state",
        token_maker(encoder.config, length),
    )


def _load(kind: Any, folder: Path, **options: str) -> Any:
    try:
        model = kind.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # of any kind: the files are the user's
        if is_out_of_memory(error):
            raise
        raise UserError(f"cannot load {folder}: {first_line(error)}") from error
    return model.float().eval().requires_grad_(False)
