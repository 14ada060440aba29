"""The Stable Diffusion pipelines that are accelerated, of random tiny models, and a call of each.

`PIPELINES` names them; `make_pipeline` builds one, and `draw` calls it on its own kind of inputs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextModelWithProjection

from tests.tiny_models import (
    CROSS_ATTENTION_DIM,
    tiny_scheduler,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_unet,
    tiny_vae,
)

PIPELINES: dict[str, type[DiffusionPipeline]] = {
    "text-to-image": StableDiffusionPipeline,
    "image-to-image": StableDiffusionImg2ImgPipeline,
    "inpainting": StableDiffusionInpaintPipeline,
    "ControlNet": StableDiffusionControlNetPipeline,
    "SDXL": StableDiffusionXLPipeline,
    "SDXL image-to-image": StableDiffusionXLImg2ImgPipeline,
}
SIZE = 64


def make_pipeline(name: str, seed: int = 0) -> DiffusionPipeline:
    """The pipeline on the CPU in float32, in evaluation mode, without a progress bar. A seed gives equal weights."""
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer(Path(folder))
        components: dict[str, Any] = {
            "vae": tiny_vae(),
            "text_encoder": tiny_text_encoder(tokenizer),
            "tokenizer": tokenizer,
            "scheduler": tiny_scheduler(),
        }
        if name.startswith("SDXL"):
            # Its text encoders give their last layer but one, and the second a pooled prompt.
            config = components["text_encoder"].config.__class__(**components["text_encoder"].config.to_dict())
            config.projection_dim = CROSS_ATTENTION_DIM
            components |= {
                "text_encoder_2": CLIPTextModelWithProjection(config),
                "tokenizer_2": tokenizer,
                "unet": tiny_xl_unet(),
            }
        else:
            components |= {"unet": tiny_unet(), "safety_checker": None, "feature_extractor": None}
            components["requires_safety_checker"] = False
        if name == "ControlNet":
            components["controlnet"] = ControlNetModel.from_unet(
                components["unet"], conditioning_embedding_out_channels=(8, 8, 16, 16)
            )
            controlnet = components["controlnet"]
            for layer in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
                torch.nn.init.normal_(layer.weight, std=0.1)  # fresh ones add nothing
        pipe = PIPELINES[name](**components)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_xl_unet() -> UNet2DConditionModel:
    """UNet with SDXL's topology: no attention in the outermost blocks, several layers in one transformer."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 32, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(4, 4, 8),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=2 * CROSS_ATTENTION_DIM,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + CROSS_ATTENTION_DIM,
    )


def inputs_of(name: str, size: int = SIZE) -> dict[str, Any]:
    """What a call of the pipeline takes beside the prompt: its pictures, and how strongly they are changed."""
    ramp = torch.arange(size * size * 3).reshape(size, size, 3) % 251
    picture = Image.fromarray(ramp.to(torch.uint8).numpy())
    mask = Image.new("L", (size, size))
    mask.paste(255, (0, 0, size // 2, size))
    if name in ("image-to-image", "SDXL image-to-image"):
        return {"image": picture, "strength": 0.99}
    if name == "inpainting":
        return {"image": picture, "mask_image": mask, "strength": 0.99, "height": size, "width": size}
    if name == "ControlNet":
        return {"image": picture, "height": size, "width": size}
    return {"height": size, "width": size}


def draw(pipe: DiffusionPipeline, name: str, **kwargs: Any) -> Any:
    """The latents of one picture `[1, 4, height / 8, width / 8]`, from seven steps; `kwargs` are the pipeline's."""
    options = {"num_inference_steps": 7, "output_type": "latent", "guidance_scale": 5.0, **inputs_of(name), **kwargs}
    return pipe("a red circle", generator=torch.Generator().manual_seed(0), **options).images
