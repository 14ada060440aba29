"""A tiny HiDream with random weights: all eleven components, in float32 on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImageTransformer2DModel,
    UniPCMultistepScheduler,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

LAYERS, SINGLE_LAYERS = 1, 2
WORDS = (
    "make the circle blue red square remove a big star description : . low quality editing instruction target image"
)


def make_transformer(
    seed: int = 0, max_resolution: tuple[int, int] = (16, 32), head_dim: int = 16
) -> HiDreamImageTransformer2DModel:
    """Its blocks see `max_resolution[0] * max_resolution[1] / 4` tokens of a picture that is not square."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=LAYERS,
            num_single_layers=SINGLE_LAYERS,
            attention_head_dim=head_dim,
            num_attention_heads=2,
            caption_channels=[24, 20],
            text_emb_dim=64,
            num_routed_experts=4,
            num_activated_experts=2,
            axes_dims_rope=(head_dim // 2, head_dim // 4, head_dim // 4),
            max_resolution=max_resolution,
            llama_layers=[0, 1, 1],
            force_inference_output=True,
        )
        for parameter in model.parameters():  # large enough that a wrong branch shows
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_tokenizer(end: str = "</s>") -> PreTrainedTokenizerFast:
    """Splits at blanks and punctuation; words that it does not know are one token."""
    words = ["<pad>", "<unk>", end, *dict.fromkeys(WORDS.split())]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token=end, model_max_length=128
    )


def make_components(seed: int = 0, scheduler: str = "unipc") -> dict[str, Any]:
    """Of a HiDream pipeline, by their names. `scheduler` is "unipc" or "euler"."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        vocabulary = len(make_tokenizer())
        clip = CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=37,
            projection_dim=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            eos_token_id=2,
        )
        t5 = T5Config(
            vocab_size=vocabulary,
            d_model=24,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=3,
            feed_forward_proj="gated-gelu",
        )
        llama = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=20,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        )
        models_of = {
            "text_encoder": CLIPTextModelWithProjection(clip),
            "text_encoder_2": CLIPTextModelWithProjection(clip),
            "text_encoder_3": T5EncoderModel(t5),
            "text_encoder_4": LlamaForCausalLM(llama),
            "vae": vae,
        }
    if scheduler == "unipc":
        steps: Any = UniPCMultistepScheduler(flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction")
    else:
        steps = FlowMatchEulerDiscreteScheduler(shift=3.0)
    tokenizers = {name: make_tokenizer() for name in ("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4")}
    return {
        "transformer": make_transformer(seed),
        "scheduler": steps,
        **{name: model.eval() for name, model in models_of.items()},
        **tokenizers,
    }
