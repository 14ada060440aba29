"""Tiny transformers of diffusers that attend through its dispatcher, and a call of each."""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel, ModelMixin, SD3Transformer2DModel

TRANSFORMERS = (FluxTransformer2DModel, SD3Transformer2DModel)


def make_transformer(kind: type[ModelMixin], seed: int = 0) -> ModelMixin:
    """In evaluation mode, on the CPU in float32; heads of 16 channels, as the fused kernels want them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind is FluxTransformer2DModel:
            model = FluxTransformer2DModel(
                in_channels=4,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                pooled_projection_dim=32,
                axes_dims_rope=(4, 4, 8),
            )
        else:
            model = SD3Transformer2DModel(
                sample_size=32,
                patch_size=1,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                caption_projection_dim=32,
                pooled_projection_dim=64,
            )
    return model.eval()


def call(model: ModelMixin) -> torch.Tensor:
    """The prediction for a batch of two, on the model's device and in its dtype."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(model.device, model.dtype)

    timestep = torch.tensor([0.5, 0.5]).to(model.device, model.dtype)
    if isinstance(model, FluxTransformer2DModel):
        return model(
            hidden_states=noise(2, 64, 4),
            encoder_hidden_states=noise(2, 16, 32),
            pooled_projections=noise(2, 32),
            timestep=timestep,
            img_ids=torch.zeros(64, 3, device=model.device, dtype=model.dtype),
            txt_ids=torch.zeros(16, 3, device=model.device, dtype=model.dtype),
        ).sample
    return model(
        hidden_states=noise(2, 4, 8, 8),
        encoder_hidden_states=noise(2, 16, 32),
        pooled_projections=noise(2, 64),
        timestep=timestep,
    ).sample
