"""Stand-ins for the tiny models that upstream's tests fetch from the hub, so that the tests run without network.

Sizes are what the tests expect of the originals, weights and vocabularies are not. A test that compares numbers
recorded with the originals fails with them, and does so with any diffusers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
)

VOCAB_SIZE = 1000


def write_stand_ins(hf_home: Path) -> None:
    """Fills the hub cache below `hf_home`, as if each of `STAND_INS` had been downloaded."""
    for repository, write in STAND_INS.items():
        cache = hf_home / "hub" / f"models--{repository.replace('/', '--')}"
        snapshot = cache / "snapshots" / "stand-in"
        snapshot.mkdir(parents=True)
        cache.joinpath("refs").mkdir()
        cache.joinpath("refs", "main").write_text("stand-in")
        write(snapshot)


def write_clip(folder: Path) -> None:
    clip_tokenizer().save_pretrained(folder)


def write_t5(folder: Path) -> None:
    config = T5Config(
        vocab_size=VOCAB_SIZE, d_model=32, d_kv=8, d_ff=37, num_layers=5, num_heads=4, decoder_start_token_id=0
    )
    config.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)


def write_llama(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)


def clip_tokenizer() -> PreTrainedTokenizerBase:
    """A CLIP tokenizer without merges: every byte is a token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=77)


def character_tokenizer() -> PreTrainedTokenizerBase:
    """Every character of printable ASCII is a token."""
    words = ["<pad>", "</s>", "<s>", "<unk>", *map(chr, range(33, 127))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    specials = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **specials)


STAND_INS: dict[str, Callable[[Path], None]] = {
    "hf-internal-testing/tiny-random-clip": write_clip,
    "hf-internal-testing/tiny-random-t5": write_t5,
    "hf-internal-testing/tiny-random-LlamaForCausalLM": write_llama,
}
