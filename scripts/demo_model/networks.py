"""The networks of the demo model: those of Stable Diffusion 2.1-base, level for level, with far fewer channels."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from scripts.demo_model.scenes import BACKGROUNDS, COLOURS, IMAGE_SIZE, POSITIONS, RADII, SHAPES, Scene

TEXT_WIDTH = 128
TEXT_LENGTH = 77
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    """A CLIP tokenizer that knows every byte, and has one token for every word of the captions."""
    clip = CLIPTokenizer(vocab={EOS: 0}).backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(merge) for merge in merges), BOS, EOS]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_LENGTH)


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=IMAGE_SIZE,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 64),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=1,  # a group forgets its own brightness: the more groups, the less is left of plain colours
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 8,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        attention_head_dim=(1, 2, 4, 4),  # heads, whatever the name says, as in SD2.1; each is 32 wide
        use_linear_projection=True,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=8,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        hidden_act="gelu",
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_scheduler() -> PNDMScheduler:
    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )


class SceneReader(nn.Module):
    """Tells from a text encoder's output what stands at each position: the text encoder's teacher, then discarded.

    It looks at the text as the UNet does later, by cross-attention, so what it can read there the UNet can.
    """

    def __init__(self) -> None:
        super().__init__()
        self.answers = {"size": list(RADII), "colour": list(COLOURS), "kind": list(SHAPES)}
        self.queries = nn.Parameter(torch.randn(len(POSITIONS), TEXT_WIDTH))
        self.attention = nn.MultiheadAttention(TEXT_WIDTH, num_heads=4, batch_first=True)
        classes = {name: len(words) + 1 for name, words in self.answers.items()} | {"background": len(BACKGROUNDS)}
        self.heads = nn.ModuleDict({name: nn.Linear(TEXT_WIDTH, count) for name, count in classes.items()})

    def forward(self, hidden_states: Tensor, scenes: Sequence[Scene]) -> Tensor:
        """The mean cross entropy of the answers about `scenes`, given their captions' [count, 77, width] states."""
        queries = self.queries.expand(len(scenes), -1, -1)
        seen, _ = self.attention(queries, hidden_states, hidden_states, need_weights=False)
        losses = []
        for name, words in self.answers.items():
            truth = [[self._answer(scene, position, name, words) for position in POSITIONS] for scene in scenes]
            logits = self.heads[name](seen)
            losses.append(F.cross_entropy(logits.flatten(0, 1), torch.tensor(truth, device=logits.device).flatten()))
        backgrounds = [list(BACKGROUNDS).index(scene.background) for scene in scenes]
        logits = self.heads["background"](seen.mean(dim=1))
        losses.append(F.cross_entropy(logits, torch.tensor(backgrounds, device=logits.device)))
        return torch.stack(losses).mean()

    @staticmethod
    def _answer(scene: Scene, position: str, name: str, words: list[str]) -> int:
        """The number of the right word; the one after the last where nothing stands."""
        for shape in scene.shapes:
            if shape.position == position:
                return words.index(getattr(shape, name))
        return len(words)
