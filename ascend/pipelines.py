"""The pipelines that are compiled and shared, a row each: which of their models run when.

Another pipeline needs a row here, and, for models of other classes, what of their arguments has a row for each sample
(`ascend.parallel.shared_batch`).
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Parts(NamedTuple):
    """The models of a pipeline, by their paths from it.

    Attributes:
        each_step: those that run in every denoising step, the denoiser first.
        each_picture: those that run once a picture.
        shared: of which each rank computes a part of the batch.
        casts_vae: dtypes of the VAE in which the pipeline casts it to float32 and back in each call, where its
            configuration wants that.
    """

    each_step: tuple[str, ...]
    each_picture: tuple[str, ...]
    shared: tuple[str, ...]
    casts_vae: tuple[torch.dtype, ...] = ()


_FROM_TEXT = Parts(("unet",), ("text_encoder", "vae.decoder"), ("unet", "vae.decoder"))
_FROM_PICTURE = _FROM_TEXT._replace(each_picture=("text_encoder", "vae.encoder", "vae.decoder"))
_HIDREAM = Parts(("transformer",), ("vae.decoder",), ("transformer", "vae.decoder"))
_XL = _FROM_TEXT._replace(each_picture=("text_encoder", "text_encoder_2", "vae.decoder"), casts_vae=(torch.float16,))
PIPELINES = {
    "StableDiffusionPipeline": _FROM_TEXT,
    "StableDiffusionImg2ImgPipeline": _FROM_PICTURE,
    "StableDiffusionInpaintPipeline": _FROM_PICTURE,
    "StableDiffusionControlNetPipeline": Parts(
        ("unet", "controlnet"), ("text_encoder", "vae.decoder"), ("unet", "controlnet", "vae.decoder")
    ),
    "HiDreamImagePipeline": _HIDREAM,
    "HiDreamImageEditingPipeline": _HIDREAM._replace(each_picture=("vae.encoder", "vae.decoder")),
    "StableDiffusionXLPipeline": _XL,
    "StableDiffusionXLImg2ImgPipeline": _XL._replace(
        each_picture=("text_encoder", "text_encoder_2", "vae.encoder", "vae.decoder"),
        casts_vae=(torch.float16, torch.bfloat16),
    ),
}


def parts_of(pipe: DiffusionPipeline) -> Parts:
    """The row of the pipeline's class, or of the nearest one that it derives from.

    Raises:
        ValueError: there is none.
    """
    for kind in type(pipe).__mro__:
        if kind.__name__ in PIPELINES:
            return PIPELINES[kind.__name__]
    raise ValueError(f"{type(pipe).__name__} is not known here, but {', '.join(PIPELINES)} are")


def models_at(pipe: DiffusionPipeline, paths: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    """Those of the models at `paths` that the pipeline has, with their paths; optional ones may be None."""
    for path in paths:
        if getattr(pipe, owner_of(path), None) is not None:
            yield path, attrgetter(path)(pipe)


def owner_of(path: str) -> str:
    """The component that the model at `path` is a part of."""
    return path.partition(".")[0]
