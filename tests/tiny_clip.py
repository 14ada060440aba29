"""A CLIP and a SigLIP of transformers, random and small enough for a test."""

import dataclasses
import string
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
    SiglipTokenizer,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from runners.clip.backends import TorchBackend
from tests.tiny_models import tiny_tokenizer

SIDE = 32  # pixels
CLIP_TOKENS, SIGLIP_TOKENS = 77, 24
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**TOWER, "image_size": SIDE, "patch_size": 8}


def save_tiny_clip(folder: Path) -> Path:
    tokenizer = tiny_tokenizer(folder)
    text = {
        **TOWER,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CLIP_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    size = {"height": SIDE, "width": SIDE}
    processor = CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size), tokenizer)
    return _save(CLIPModel, CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24), processor, folder)


def save_tiny_siglip(folder: Path) -> Path:
    """With SigLIP's own tokenizer, of letters."""
    from sentencepiece import SentencePieceTrainer

    folder.mkdir(parents=True, exist_ok=True)
    letters = [" ".join(string.ascii_lowercase)] * 2
    with (folder / "spiece.model").open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(letters), model_writer=file, vocab_size=30, model_type="char", minloglevel=2
        )
    tokenizer = SiglipTokenizer(str(folder / "spiece.model"), model_max_length=SIGLIP_TOKENS)
    text = {
        **TOWER,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": SIGLIP_TOKENS,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    processor = SiglipProcessor(SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}), tokenizer)
    return _save(SiglipModel, SiglipConfig(text_config=text, vision_config=VISION), processor, folder)


def _save(kind: Any, config: Any, processor: Any, folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config)
        for parameter in model.parameters():  # random models tell nothing apart while their weights are small
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@dataclasses.dataclass
class Calls:
    """How many inputs each forward of a service's towers took."""

    images: list[int] = dataclasses.field(default_factory=list)
    texts: list[int] = dataclasses.field(default_factory=list)


def count_calls(backend: Any) -> Calls:
    """From now on."""
    assert isinstance(backend, TorchBackend)
    calls = Calls()
    backend.images.register_forward_pre_hook(lambda _, args: calls.images.append(len(args[0])))
    backend.texts.register_forward_pre_hook(lambda _, args: calls.texts.append(len(args[0])))
    return calls
