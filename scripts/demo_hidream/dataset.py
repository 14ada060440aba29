"""What the demo editor learns from: rendered scenes as latents, the edits between them, and all texts as tokens.

It is made once and fits in a small file: scenes come in families, in which many edits lead from one to another.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from scripts.demo_hidream.edits import KINDS, pairs_among, sample_family
from scripts.demo_hidream.networks import NEGATIVE_PROMPTS, TEXT_LENGTH
from scripts.demo_hidream.scenes import Scene
from scripts.demo_model.stages import to_tensor

INSTRUCTIONS = 4  # wordings of an edit
DESCRIPTIONS = 2  # of a scene
LATENT_STEP = 64  # latents are rounded to this part of one: a hundredth of their size, and the file a fifth as large
ENCODED_TOGETHER = 64


@dataclass
class Dataset:
    """Tensors on one device.

    Attributes:
        latents: of scenes, float [scenes, 4, 16, 16], as the VAE encodes them.
        descriptions: uint8 [scenes, wordings, tokens].
        pairs: numbers of the source and the target, int32 [pairs, 2], those of the first of KINDS first.
        instructions: uint8 [pairs, wordings, tokens].
        counts: how many pairs each of KINDS has, int64 [5].
        negatives: NEGATIVE_PROMPTS, uint8 [prompts, tokens].
    """

    latents: Tensor
    descriptions: Tensor
    pairs: Tensor
    instructions: Tensor
    counts: Tensor
    negatives: Tensor

    @property
    def shift(self) -> float:
        """What the VAE's configuration has to say for latents around zero, of unit size."""
        return float(self.latents.float().mean())

    @property
    def scale(self) -> float:
        return 1 / float(self.latents.float().std())

    def to(self, device: torch.device) -> Dataset:
        return Dataset(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def save(self, path: Path) -> None:
        arrays = {field.name: getattr(self, field.name).numpy() for field in fields(self)}
        temporary = path.with_name("." + path.name)
        np.savez_compressed(temporary, **arrays)
        temporary.rename(path)

    @staticmethod
    def load(path: Path) -> Dataset:
        with np.load(path) as arrays:
            return Dataset(**{field.name: torch.from_numpy(arrays[field.name]) for field in fields(Dataset)})


def make_dataset(
    families: int, seed: int, vae: AutoencoderKL, tokenizer: PreTrainedTokenizerFast, device: torch.device
) -> Dataset:
    """Of `families` families of about seven scenes each, from the training split alone. On the CPU."""
    scenes: list[Scene] = []
    pairs: dict[str, list[tuple[int, int, list[str]]]] = {kind: [] for kind in KINDS}
    descriptions = []
    for number in range(families):
        rng = random.Random(f"{seed}/family/{number}")
        family, first = sample_family(rng), len(scenes)
        scenes += family
        descriptions += [scene.description(rng) for scene in family for _ in range(DESCRIPTIONS)]
        for source, target, edit in pairs_among(family):
            texts = [edit.instruction(rng) for _ in range(INSTRUCTIONS)]
            pairs[edit.kind].append((first + source, first + target, texts))
    ordered = [pair for kind in KINDS for pair in pairs[kind]]
    instructions = [text for _, _, texts in ordered for text in texts]
    return Dataset(
        latents=encode_scenes(scenes, vae, device),
        descriptions=tokenize(tokenizer, descriptions).unflatten(0, (len(scenes), DESCRIPTIONS)),
        pairs=torch.tensor([pair[:2] for pair in ordered], dtype=torch.int32),
        instructions=tokenize(tokenizer, instructions).unflatten(0, (len(ordered), INSTRUCTIONS)),
        counts=torch.tensor([len(pairs[kind]) for kind in KINDS]),
        negatives=tokenize(tokenizer, NEGATIVE_PROMPTS),
    )


@torch.no_grad()
def encode_scenes(scenes: Sequence[Scene], vae: AutoencoderKL, device: torch.device) -> Tensor:
    """Latents of rendered scenes, float16 [count, 4, 16, 16], rounded."""
    chunks = []
    for start in tqdm(range(0, len(scenes), ENCODED_TOGETHER), desc="latents", unit="batch", mininterval=2):
        pictures = to_tensor([scene.render() for scene in scenes[start : start + ENCODED_TOGETHER]], device)
        latents = vae.encode(pictures).latent_dist.mode()
        chunks.append(((latents * LATENT_STEP).round() / LATENT_STEP).half().cpu())
    return torch.cat(chunks)


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """Texts as the pipeline reads them, uint8 [count, tokens]: the vocabulary is small."""
    options = {"padding": "max_length", "max_length": TEXT_LENGTH, "truncation": True, "return_tensors": "pt"}
    return tokenizer(list(texts), **options).input_ids.to(torch.uint8)
