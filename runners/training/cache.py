"""Latents and text embeddings on disk: computed once, read in every step, in which no VAE and no text encoder runs.

A file is named by all that its content depends on: the picture's or caption's bytes, the size, and the weights of what
encoded it. Changed inputs have other names; a folder that is no longer wanted can be removed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import find_nearest_bucket, generate_aspect_ratio_buckets
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from runners.files import write_atomically
from runners.training.pictures import Picture

BUCKET_STEP = 64  # pixels: a UNet of four levels halves latents, of an eighth of the pixels, three times
FORMAT = 3  # of the files; another one is another name


@dataclass(frozen=True)
class Sizes:
    """To which height and width pictures are brought: one square, or the bucket of the nearest aspect ratio."""

    resolution: int
    buckets: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, resolution: int, aspect_ratio_buckets: bool) -> Sizes:
        if not aspect_ratio_buckets:
            return cls(resolution, ((resolution, resolution),))
        step = min(BUCKET_STEP, resolution)
        return cls(resolution, tuple(generate_aspect_ratio_buckets(resolution, step)))

    def of_picture(self, picture: Image.Image) -> tuple[int, int]:
        return self.buckets[find_nearest_bucket(picture.height, picture.width, self.buckets)]


class InputCache:
    """The inputs of a training by one model.

    Args:
        folder: shared by all ranks, and by other trainings if wanted.
        model_digest: of the model's files, see `runners.model_dir.Model.digest`.
        flips: whether pictures are also encoded flipped.
        load: gives the pipeline whose VAE and text encoder compute, once something is missing.
    """

    def __init__(
        self, folder: Path, model_digest: str, sizes: Sizes, flips: bool, load: Callable[[], StableDiffusionPipeline]
    ) -> None:
        self.folder, self.model_digest, self.sizes, self.flips, self.load = folder, model_digest, sizes, flips, load

    def latents_path(self, picture: Picture) -> Path:
        return self._path("latents", picture.data, f"{self.sizes} {self.flips}")

    def text_path(self, caption: str) -> Path:
        return self._path("texts", caption.encode(), "")

    def _path(self, kind: str, data: bytes, settings: str) -> Path:
        about = f"{FORMAT} {self.model_digest} {settings} {hashlib.sha256(data).hexdigest()}"
        name = hashlib.sha256(about.encode()).hexdigest()
        return self.folder / kind / name[:2] / f"{name}.safetensors"

    def encode_picture(self, picture: Picture) -> None:
        """Write the picture's latents unless they are there.

        `mean` and `std` of the VAE's distribution, times its scaling factor, float32 [channels, height / 8,
        width / 8], and the same of the mirrored picture; `enlarged`, whether the picture has fewer pixels, bool.

        Raises:
            UserError: the picture cannot be read.
        """
        path = self.latents_path(picture)
        if is_whole(path):
            return
        image = picture.decode()
        height, width = self.sizes.of_picture(image)
        fitted = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
        tensors = self._latents(fitted, "")
        if self.flips:
            tensors |= self._latents(ImageOps.mirror(fitted), "_flipped")
        enlarged = torch.tensor(image.height < height or image.width < width)
        write(path, tensors | {"enlarged": enlarged})

    @torch.no_grad()
    def _latents(self, image: Image.Image, suffix: str) -> dict[str, Tensor]:
        vae = self.load().vae
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
        posterior = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist
        factor = vae.config.scaling_factor
        return {
            f"mean{suffix}": (posterior.mean[0] * factor).float().cpu(),
            f"std{suffix}": (posterior.std[0] * factor).float().cpu(),
        }

    @torch.no_grad()
    def encode_text(self, caption: str) -> None:
        """Write the caption's embeddings unless they are there: `embeddings`, float32 [tokens, width], and `cut`.

        `cut` is how many of its tokens are too many for the text encoder, int64.
        """
        path = self.text_path(caption)
        if is_whole(path):
            return
        pipe = self.load()
        length = pipe.tokenizer.model_max_length
        tokens = pipe.tokenizer(
            caption, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        cut = max(0, len(pipe.tokenizer(caption).input_ids) - length)
        states = pipe.text_encoder(tokens.to(pipe.text_encoder.device))[0]
        write(path, {"embeddings": states[0].float().cpu(), "cut": torch.tensor(cut)})


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def is_whole(path: Path) -> bool:
    """Whether the file is there and can be read; a damaged one counts as missing and is written anew."""
    return bool(read(path))


def read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return {}
