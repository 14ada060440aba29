"""What a training reads in its steps: examples of pictures and captions, all of them encoded before the first step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from runners.cli import UserError
from runners.training.batches import draw
from runners.training.cache import InputCache, read
from runners.training.pictures import Skipped, read_pictures
from runners.training.settings import Settings


class Example(NamedTuple):
    """Where it is; `shape` is of the latents, `cut` how many tokens of the caption are beyond the text encoder's.

    `enlarged` is whether the picture has fewer pixels than it is trained with.
    """

    latents: Path
    text: Path
    shape: tuple[int, ...]
    cut: int
    enlarged: bool


class Batch(NamedTuple):
    """Examples with their random numbers, on the CPU: float32, timesteps int64 [count]."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    texts: Tensor


@dataclass(frozen=True)
class Inputs:
    examples: Sequence[Example]
    empty_text: Path
    settings: Settings

    def buckets(self) -> list[list[int]]:
        """The examples' numbers by the latents' shape."""
        found: dict[tuple[int, ...], list[int]] = {}
        for number, example in enumerate(self.examples):
            found.setdefault(example.shape, []).append(number)
        return list(found.values())

    def digest(self) -> str:
        """Of all that is learnt from, in its order: the names of stored files are digests of pictures and captions."""
        names = [(example.latents.name, example.text.name) for example in self.examples]
        return hashlib.sha256(repr(names).encode()).hexdigest()

    def batch(self, numbers: Sequence[int], step: int, places: Sequence[int], timesteps: int) -> Batch:
        """The examples `numbers`, which have the `places` in the batch of `step`."""
        settings = self.settings
        rows = []
        for number, place in zip(numbers, places, strict=True):
            example = self.examples[number]
            random = draw(settings.seed, step, place, example.shape, timesteps)
            flip, drop = random.uniform
            suffix = "_flipped" if settings.random_flip and flip < 0.5 else ""
            stored = required(example.latents)
            latents = stored[f"mean{suffix}"] + stored[f"std{suffix}"] * random.posterior
            noise = random.noise + settings.noise_offset * random.offset
            text = self.empty_text if drop < settings.caption_dropout else example.text
            rows.append((latents, noise, torch.tensor(random.timestep), required(text)["embeddings"]))
        return Batch(*(torch.stack(column) for column in zip(*rows, strict=True)))


def required(path: Path) -> dict[str, Tensor]:
    tensors = read(path)
    if not tensors:
        raise UserError(f"{path} is gone or damaged since the training began: start again with --resume")
    return tensors


def prepare_inputs(cache: InputCache, settings: Settings, accelerator: Accelerator, skipped: Skipped) -> Inputs:
    """Encode what is missing, each rank its share, and list the examples that are there then, the same on all ranks.

    Raises:
        UserError: no picture can be used.
    """
    rank, world_size = accelerator.process_index, accelerator.num_processes
    found: list[tuple[str, Path, str]] = []
    pictures = read_pictures(settings.data, settings.image_column, settings.caption_column, skipped)
    with tqdm(pictures, "encoding", unit="picture", disable=rank > 0, mininterval=1) as bar:
        for number, picture in enumerate(bar):
            if number % world_size == rank:
                try:
                    cache.encode_picture(picture)
                    cache.encode_text(picture.caption)
                except UserError as error:
                    skipped.add(picture.name, str(error).removeprefix(picture.name).lstrip(": "))
            found.append((picture.name, cache.latents_path(picture), picture.caption))
    if accelerator.is_main_process:
        cache.encode_text("")
    accelerator.wait_for_everyone()
    for name, reason in (row for reasons in gather_object([skipped.reasons]) for row in reasons.items()):
        skipped.add(name, reason)
    examples = []
    for name, latents, caption in found:
        stored = {} if name in skipped.reasons else read(latents)
        if stored:
            text = cache.text_path(caption)
            shape, enlarged = tuple(stored["mean"].shape), bool(stored["enlarged"])
            examples.append(Example(latents, text, shape, int(required(text)["cut"]), enlarged))
    if not found and not skipped.reasons:
        raise UserError(f"--data {settings.data}: there is no row in any of its Parquet files")
    if not examples:
        name, reason = next(iter(skipped.reasons.items()))
        raise UserError(
            f"--data {settings.data}: none of {len(skipped.reasons)} pictures can be used, as {name}: {reason}"
        )
    return Inputs(examples, cache.text_path(""), settings)
