"""The UNet that is trained: all of its weights, or an adapter beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel, _collate_lora_metadata, cast_training_params
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn

from runners.cli import UserError, is_out_of_memory
from runners.model_dir import Model
from runners.training.settings import LORA_LAYERS, Settings
from runners.weight_files import first_line

LORA_FILE = "pytorch_lora_weights.safetensors"  # as diffusers calls it


def load_unet(model: Model, folder: Path, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet of a checked model, on the CPU. Raises UserError: its file holds another one."""
    options: dict[str, Any] = {"torch_dtype": dtype, "subfolder": "unet"}
    try:
        if model.checkpoint:
            return UNet2DConditionModel.from_single_file(str(model.checkpoint), config=str(model.folder), **options)
        return UNet2DConditionModel.from_pretrained(folder, variant=model.variant, local_files_only=True, **options)
    except Exception as error:  # of any kind: the files are the user's
        if is_out_of_memory(error):
            raise
        raise UserError(f"cannot load the UNet in {folder}: {first_line(error)}") from error


def make_trainable(unet: UNet2DConditionModel, settings: Settings) -> None:
    """Let gradients be taken of all weights, or of an adapter's alone, which is added; these are float32.

    An adapter starts from the seed, and the UNet with it computes what it did: its second matrices are 0.
    """
    if settings.full:
        unet.requires_grad_(True)
    else:
        unet.requires_grad_(False)
        config = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            init_lora_weights="gaussian",
            target_modules=list(LORA_LAYERS[settings.lora_layers]),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            unet.add_adapter(config)
        cast_training_params(unet, torch.float32)
    unet.train()


def trained(unet: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


@contextmanager
def averaged(unet: nn.Module, average: EMAModel | None) -> Iterator[None]:
    """The average of the weights in the place of the last ones, where one is kept."""
    if average is None:
        yield
        return
    average.store(trained(unet))
    average.copy_to(trained(unet))
    try:
        yield
    finally:
        average.restore(trained(unet))


def save_adapter(unet: UNet2DConditionModel, folder: Path) -> None:
    """Write the adapter to `LORA_FILE`, with keys as peft has them and its configuration inside."""
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=get_peft_model_state_dict(unet), **_collate_lora_metadata({"unet": unet})
    )
