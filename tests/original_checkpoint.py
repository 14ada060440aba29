"""A pipeline as one file in the layout of Stable Diffusion 2's authors, of which diffusers has only the way back."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
CLIP = {
    "layers.": "resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def save_original(pipe: StableDiffusionPipeline, path: Path) -> None:
    """Write the weights of UNet, VAE and text encoder to `path`, a .safetensors or .ckpt file."""
    tensors = {f"model.diffusion_model.{name}": value for name, value in unet_tensors(pipe).items()}
    tensors |= {f"first_stage_model.{name}": value for name, value in vae_tensors(pipe).items()}
    tensors |= {f"cond_stage_model.model.{name}": value for name, value in text_tensors(pipe).items()}
    tensors = {name: value.detach().clone() for name, value in tensors.items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors}, path)


def replaced(text: str, names: dict[str, str]) -> str:
    for new, old in names.items():
        text = text.replace(new, old)
    return text


def unet_tensors(pipe: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    layers = pipe.unet.config.layers_per_block
    attends = ["CrossAttn" in kind for kind in pipe.unet.config.up_block_types]
    outer = DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"]
    tensors = {}
    for name, value in pipe.unet.state_dict().items():
        found = re.fullmatch(r"(down_blocks|mid_block|up_blocks)\.(?:(\d)\.)?(\w+)\.(\d)\.(.*)", name)
        if not found:
            tensors[outer[name]] = value
            continue
        place, block, kind, number, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
        rest = replaced(rest, RESNET) if kind == "resnets" else rest
        if place == "mid_block":
            name = f"middle_block.{2 * number if kind == 'resnets' else 1}.{rest}"
        elif kind == "downsamplers":
            name = f"input_blocks.{block * (layers + 1) + layers + 1}.0.op.{rest.removeprefix('conv.')}"
        elif kind == "upsamplers":
            name = f"output_blocks.{block * (layers + 1) + layers}.{2 if attends[block] else 1}.{rest}"
        else:
            first, side = (1, "input") if place == "down_blocks" else (0, "output")
            name = f"{side}_blocks.{block * (layers + 1) + number + first}.{int(kind == 'attentions')}.{rest}"
        tensors[name] = value
    return tensors


def vae_tensors(pipe: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    last = len(pipe.vae.config.up_block_types) - 1
    outer = DIFFUSERS_TO_LDM_MAPPING["vae"]
    tensors = {}
    for name, value in pipe.vae.state_dict().items():
        if "mid_block.attentions" in name:
            name = replaced(name.replace("mid_block.attentions.0", "mid.attn_1"), VAE_ATTENTION)
            value = value[:, :, None, None] if value.ndim == 2 else value
        elif found := re.fullmatch(r"(\w+)\.mid_block\.resnets\.(\d)\.(.*)", name):
            name = f"{found[1]}.mid.block_{int(found[2]) + 1}.{found[3]}"
        elif found := re.fullmatch(r"(\w+)\.(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name):
            block = int(found[3]) if found[2] == "down" else last - int(found[3])
            layer = f"block.{found[5]}" if found[4] == "resnets" else f"{found[2]}sample"
            name = f"{found[1]}.{found[2]}.{block}.{layer}.{found[6]}"
        else:
            name = outer[name]
        tensors[name.replace("conv_shortcut", "nin_shortcut")] = value
    return tensors


def text_tensors(pipe: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    outer = DIFFUSERS_TO_LDM_MAPPING["openclip"]["layers"]
    weights = {name.removeprefix("text_model."): value for name, value in pipe.text_encoder.state_dict().items()}
    tensors = {}
    for name, value in weights.items():
        if f"text_model.{name}" in outer:
            tensors[outer[f"text_model.{name}"]] = value
        elif ".q_proj." in name:
            parts = [weights[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            name = re.sub(r"self_attn\.q_proj\.(\w+)", r"attn.in_proj_\1", name)
            tensors[f"transformer.{replaced(name.removeprefix('encoder.'), CLIP)}"] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            tensors[f"transformer.{replaced(name.removeprefix('encoder.'), CLIP)}"] = value
    return tensors
