"""CLIP and SigLIP as transformers saves them: the model, what prepares its inputs, and how it scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoProcessor, PretrainedConfig, PreTrainedModel

from runners.cli import UserError, is_out_of_memory
from runners.weight_files import first_line

SOFTMAX, SIGMOID = "softmax", "sigmoid"
# SigLIP reads texts that are padded to their full length, as it was trained, and scores each pair alone.
SCORING_OF = {"clip": SOFTMAX, "siglip": SIGMOID}


@dataclass(frozen=True)
class Scoring:
    """How features become probabilities.

    Attributes:
        kind: SOFTMAX, over the texts (they add up to 1), or SIGMOID, of each text alone.
        scale, bias: of the cosine of two features.
    """

    kind: str
    scale: float
    bias: float

    @classmethod
    def of(cls, model: PreTrainedModel) -> Scoring:
        bias = model.logit_bias.item() if hasattr(model, "logit_bias") else 0.0
        return cls(SCORING_OF[model.config.model_type], model.logit_scale.exp().item(), bias)

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """[images, texts] of normalised features, [images, width] and [texts, width]."""
        return images @ texts.T * self.scale + self.bias

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.softmax(dim=-1) if self.kind == SOFTMAX else logits.sigmoid()


class Tower(nn.Module):
    """What makes features of one kind of input: an encoder, and a projection where the model has one."""

    def __init__(self, encoder: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.encoder, self.projection = encoder, projection

    def forward(self, inputs: Tensor) -> Tensor:
        """[count, width], not normalised, of pixel values [count, 3, height, width] or token ids [count, length].

        There is no mask of padding: CLIP's texts attend to what is before them and are read at their end, and SigLIP
        was trained without one.
        """
        return self.projection(self.encoder(inputs).pooler_output)


def image_tower(model: PreTrainedModel) -> Tower:
    return Tower(model.vision_model, getattr(model, "visual_projection", nn.Identity()))


def text_tower(model: PreTrainedModel) -> Tower:
    return Tower(model.text_model, getattr(model, "text_projection", nn.Identity()))


def load_model(path: str, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """The CLIP or SigLIP in the folder `path`, or of that name on the hub, for inference on the CPU.

    Raises:
        UserError: there is none, or it is of another kind.
    """
    config = _load(AutoConfig, path)
    if config.model_type not in SCORING_OF:
        raise UserError(f"{path} is of the kind '{config.model_type}': {' or '.join(SCORING_OF)} is wanted")
    return _load(AutoModel, path, dtype=dtype, **options).eval().requires_grad_(False)


def load_processor(path: str) -> Any:
    """What makes pixel values of pictures and token ids of texts.

    Raises:
        UserError: there is none.
    """
    processor = _load(AutoProcessor, path)
    if not hasattr(processor, "image_processor"):
        raise UserError(f"{path} does not say how pictures are prepared: it lacks preprocessor_config.json")
    return processor


def _load(kind: Any, path: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(path, **options)
    except Exception as error:  # of any kind: the files are the user's
        if is_out_of_memory(error):
            raise
        absent = "" if Path(path).is_dir() else f" (there is no folder {path}, and the hub or its cache has none)"
        raise UserError(f"cannot load a CLIP model from {path}{absent}: {first_line(error)}") from error


def text_length_of(config: PretrainedConfig) -> int:
    """How many tokens a text may have."""
    return int(config.text_config.max_position_embeddings)
