"""The networks of the demo editor: those of HiDream-E1.1, part for part, with far fewer channels and layers."""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import HiDreamImageTransformer2DModel, UniPCMultistepScheduler
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from scripts.demo_hidream.edits import WORDINGS
from scripts.demo_hidream.scenes import CORNERS, RADII
from scripts.demo_model.scenes import BACKGROUNDS, COLOURS, SHAPES

LATENT_SIZE = 16
CHANNELS = 4
TEXT_LENGTH = 24  # tokens; a description of four shapes has 23
CLIP_LENGTH = 218  # tokens, as many as the pipeline may ask for
WIDTH = 128  # of T5, Llama and the transformers
CLIP_WIDTHS = (96, 160)
LLAMA_LAYERS = 3
FLOW_SHIFT = 3.0
NEGATIVE_PROMPTS = ("", "low quality, blurry, distorted", "low resolution, blur")  # those of HiDream-E1's scripts
UNKNOWN, END = "<unk>", "</s>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the demo's texts, none for punctuation, and one for all other words.

    It fills up with its end token, as the pipeline makes Llama's do. The real CLIP, T5 and Llama cut words each in its
    own way; here all four read alike.
    """
    texts: Iterable[str] = itertools.chain(*WORDINGS.values(), NEGATIVE_PROMPTS, BACKGROUNDS, COLOURS, SHAPES, RADII)
    text = " ".join([*texts, *CORNERS, "it the shape in background"])
    for field in ("it", "size", "colour", "shape", "corner"):
        text = text.replace(f"{{{field}}}", "")
    words = sorted(set(text.replace(",", "").split()))
    vocabulary = {word: index for index, word in enumerate([UNKNOWN, END, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[^a-z0-9]+"), "removed")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, vocabulary[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=END, unk_token=UNKNOWN, eos_token=END, model_max_length=TEXT_LENGTH
    )


class Texts(NamedTuple):
    """What the transformer knows of `count` texts, as the pipeline's `encode_prompt` returns it."""

    t5: Tensor  # [count, tokens, width]
    llama: Tensor  # [layers, count, tokens, width]
    pooled: Tensor  # [count, channels]


class TextEncoders(nn.Module):
    """Two CLIPs, T5 and Llama, under their names in the pipeline."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        vocabulary = len(tokenizer)
        self.end = int(tokenizer.eos_token_id)
        self.text_encoder, self.text_encoder_2 = (
            CLIPTextModelWithProjection(
                CLIPTextConfig(
                    vocab_size=vocabulary,
                    hidden_size=width,
                    intermediate_size=2 * width,
                    projection_dim=width,
                    num_hidden_layers=2,
                    num_attention_heads=width // 32,
                    max_position_embeddings=CLIP_LENGTH,
                    bos_token_id=self.end,
                    eos_token_id=self.end,
                    pad_token_id=self.end,
                )
            )
            for width in CLIP_WIDTHS
        )
        self.text_encoder_3 = T5EncoderModel(
            T5Config(
                vocab_size=vocabulary,
                d_model=WIDTH,
                d_kv=32,
                d_ff=2 * WIDTH,
                num_layers=2,
                num_heads=WIDTH // 32,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                pad_token_id=self.end,
                eos_token_id=self.end,
            )
        )
        self.text_encoder_4 = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=LLAMA_LAYERS,
                num_attention_heads=WIDTH // 32,
                max_position_embeddings=CLIP_LENGTH,
                tie_word_embeddings=True,
                initializer_range=WIDTH**-0.5,
                bos_token_id=self.end,
                eos_token_id=self.end,
            )
        )

    def forward(self, ids: Tensor) -> Texts:
        """Of int64 [count, tokens], filled up with the end token."""
        ends = (ids == self.end).long()
        mask = (ends.cumsum(1) - ends == 0).long()  # up to the first end, which belongs to the text
        pooled = [encoder(ids).text_embeds for encoder in (self.text_encoder, self.text_encoder_2)]
        t5 = self.text_encoder_3(ids, attention_mask=mask).last_hidden_state
        llama = self.text_encoder_4.model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[1:]
        return Texts(t5, torch.stack(llama), torch.cat(pooled, dim=-1))


def build_transformer(double_blocks: int, single_blocks: int, source: bool) -> HiDreamImageTransformer2DModel:
    """One that edits sees the source beside the picture, one that refines does not."""
    blocks = range(double_blocks + single_blocks)
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=double_blocks,
        num_single_layers=single_blocks,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        caption_channels=[WIDTH, WIDTH],
        text_emb_dim=sum(CLIP_WIDTHS),
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(8, 12, 12),
        max_resolution=(LATENT_SIZE, LATENT_SIZE * (2 if source else 1)),  # no more tokens than there are: no padding
        llama_layers=[min(block, LLAMA_LAYERS - 1) for block in blocks],
    )
    initialise(transformer)
    return transformer


def build_editor() -> HiDreamImageTransformer2DModel:
    return build_transformer(2, 3, source=True)


def build_refiner() -> HiDreamImageTransformer2DModel:
    return build_transformer(1, 2, source=False)


def initialise(transformer: HiDreamImageTransformer2DModel) -> None:
    """As in DiT (arXiv 2212.09748, adaLN-Zero): each block starts as the identity, the output at zero."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, module in transformer.named_modules():
        if name.endswith("adaLN_modulation"):
            nn.init.zeros_(module[-1].weight)
    for embedder in (transformer.t_embedder.timestep_embedder, transformer.p_embedder.pooled_embedder):
        for linear in (embedder.linear_1, embedder.linear_2):
            nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(transformer.final_layer.linear.weight)


def train_experts_densely(transformer: HiDreamImageTransformer2DModel) -> None:
    """Let its mixtures compute all experts for all tokens: the same function, in a few large matrix products."""
    for module in transformer.modules():
        if isinstance(module, MOEFeedForwardSwiGLU):
            module.forward = types.MethodType(_dense_experts, module)


def _dense_experts(self: MOEFeedForwardSwiGLU, x: Tensor) -> Tensor:
    """Maps [batch, tokens, width] to the same. Experts that a token does not choose have weight zero."""
    scores = F.linear(x, self.gate.weight).softmax(dim=-1)
    kept, chosen = scores.topk(self.num_activated_experts, dim=-1, sorted=False)
    weights = torch.zeros_like(scores).scatter(-1, chosen, kept)
    w1, w3 = (torch.cat([getattr(expert, name).weight for expert in self.experts]) for name in ("w1", "w3"))
    w2 = torch.cat([expert.w2.weight for expert in self.experts], dim=1)
    hidden = (F.silu(F.linear(x, w1)) * F.linear(x, w3)).unflatten(-1, (len(self.experts), -1))
    weighted = (hidden * weights.unsqueeze(-1).to(hidden.dtype)).flatten(-2)
    return F.linear(weighted, w2) + self.shared_experts(x)


def to_patches(latents: Tensor) -> Tensor:
    """Latents [count, channels, h, w] as a transformer in training returns them: [count, channels, patches, 4]."""
    return latents.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).transpose(-3, -2).flatten(-2).flatten(-3, -2)


def build_scheduler() -> UniPCMultistepScheduler:
    """HiDream's, with the shift of its own script."""
    return UniPCMultistepScheduler(flow_shift=FLOW_SHIFT, use_flow_sigmas=True, prediction_type="flow_prediction")
