"""Switch the kernels and token merging of a whole pipeline on and off.

Both may be on together, in any order, and be switched on again. Each installed processor remembers the one it
replaced, so that the `disable_` functions put back the very same objects.
"""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.attention_processor import AttnProcessor2_0 as DefaultAttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from transformers.activations import GELUActivation
from transformers.models.clip.modeling_clip import CLIPPreTrainedModel

from processors import resnet, text_encoder
from processors.attn_processor import AttnProcessor2_0
from processors.tome_processor import AttnProcessor2_0Tome, check_ratio

logger = logging.getLogger(__name__)


def enable_flash_attention(pipe: DiffusionPipeline) -> None:
    """Let every model of `pipe` attend through `processors.kernels`, and use the exact fused kernels of an NPU.

    Replaces diffusers' default attention processor in the UNet, the VAE and whatever else has one, torch's attention
    in CLIP models, GroupNorm followed by SiLU in residual blocks, and the GELU of transformers. Which kernel runs is
    decided at each call by the device of its tensors, so the pipeline may be moved afterwards; off the NPU, results
    do not change by a bit. Processors that are not the default (IP-Adapter, fused projections) stay, with a warning.

    Raises:
        ValueError: no attention of `pipe` has the default processor.
    """
    attentions = _attentions(pipe)
    defaults = [attn for attn in attentions if type(_kernel_processor(attn)) is DefaultAttnProcessor]
    others = [attn for attn in attentions if type(_kernel_processor(attn)) not in _REPLACEABLE]
    if len(others) == len(attentions):
        raise ValueError(f"no attention of this pipeline has diffusers' AttnProcessor2_0: found {_types(others)}")
    if others:
        logger.warning("enable_flash_attention leaves these attention processors as they are: %s", _types(others))

    for attn in defaults:
        processor = AttnProcessor2_0()
        processor.replaced = _kernel_processor(attn)
        _set_kernel_processor(attn, processor)
    for module in _modules(pipe):
        if type(module) is ResnetBlock2D:
            resnet.fuse(module)
        elif isinstance(module, CLIPPreTrainedModel):
            text_encoder.use_kernels(module)
        elif isinstance(module, GELUActivation):
            text_encoder.use_exact_gelu(module)


def disable_flash_attention(pipe: DiffusionPipeline) -> None:
    """Undo `enable_flash_attention`; does nothing where it was not enabled."""
    for attn in _attentions(pipe):
        processor = _kernel_processor(attn)
        if isinstance(processor, AttnProcessor2_0) and processor.replaced is not None:
            _set_kernel_processor(attn, processor.replaced)
    for module in _modules(pipe):
        if isinstance(module, resnet.FusedResnetBlock2D):
            resnet.unfuse(module)
        elif isinstance(module, CLIPPreTrainedModel):
            text_encoder.use_default(module)
        elif isinstance(module, GELUActivation):
            text_encoder.use_default_gelu(module)


def enable_token_merging(pipe: DiffusionPipeline, ratio: float = 0.5, max_downsample: int | None = None) -> None:
    """Merge `ratio` of the tokens in self-attentions of the UNet of `pipe`. Called again, it replaces the old setting.

    Args:
        ratio: share of the tokens to remove, from 0 to 0.75.
        max_downsample: 1, 2, 4, ...: merge in every block whose resolution is at least 1 / max_downsample of the
            latents'. None: in the first down block and the first two layers of the last up block.

    Raises:
        ValueError: no 2D UNet, no such block, `ratio` out of range, or a block whose attention processor is not
            diffusers' default. Nothing has changed then.
    """
    check_ratio(ratio)
    attentions = _self_attentions(_unet(pipe), max_downsample)
    if not attentions:
        raise ValueError(f"the UNet has no self-attention at max_downsample={max_downsample}: try a larger one")
    others = [attn for attn in attentions if type(_kernel_processor(attn)) not in _REPLACEABLE]
    if others:
        raise ValueError(f"token merging replaces diffusers' AttnProcessor2_0 only: found {_types(others)}")

    disable_token_merging(pipe)
    for attn in attentions:
        processor: Any = AttnProcessor2_0Tome(ratio=ratio)
        processor.replaced = attn.processor
        attn.set_processor(processor)


def disable_token_merging(pipe: DiffusionPipeline) -> None:
    """Undo `enable_token_merging`; does nothing where it was not enabled."""
    for attn in _attentions(pipe):
        if isinstance(attn.processor, AttnProcessor2_0Tome) and attn.processor.replaced is not None:
            attn.set_processor(attn.processor.replaced)


_REPLACEABLE = (DefaultAttnProcessor, AttnProcessor2_0)  # not their subclasses, which may do more


def _kernel_processor(attn: Attention) -> Any:
    """The processor of `attn`, or the one that token merging replaced."""
    processor: Any = attn.processor
    merging = isinstance(processor, AttnProcessor2_0Tome) and processor.replaced is not None
    return processor.replaced if merging else processor


def _set_kernel_processor(attn: Attention, processor: Any) -> None:
    installed: Any = attn.processor
    if installed is _kernel_processor(attn):
        attn.set_processor(processor)
    else:
        installed.replaced = processor


def _modules(pipe: DiffusionPipeline) -> Iterator[torch.nn.Module]:
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            yield from component.modules()


def _attentions(pipe: DiffusionPipeline) -> list[Attention]:
    return [module for module in _modules(pipe) if isinstance(module, Attention)]


def _unet(pipe: DiffusionPipeline) -> UNet2DConditionModel:
    unet = getattr(pipe, "unet", None)
    unet = getattr(unet, "_orig_mod", unet)  # what torch.compile wrapped
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(f"token merging needs a UNet2DConditionModel, but {type(pipe).__name__} has none as .unet")
    return unet


def _self_attentions(unet: UNet2DConditionModel, max_downsample: int | None) -> list[Attention]:
    down, up = unet.down_blocks, unet.up_blocks
    if max_downsample is None:
        return _self_attentions_of(down[0]) + _self_attentions_of(up[-1])[:2]
    levels = [*down, unet.mid_block, *up]
    downsamples = [2 ** min(level, len(levels) - 1 - level, len(down) - 1) for level in range(len(levels))]
    chosen = [block for block, downsample in zip(levels, downsamples, strict=True) if downsample <= max_downsample]
    return [attn for block in chosen for attn in _self_attentions_of(block)]


def _self_attentions_of(block: torch.nn.Module | None) -> list[Attention]:
    transformers = [] if block is None else [m for m in block.modules() if isinstance(m, BasicTransformerBlock)]
    return [transformer.attn1 for transformer in transformers if not transformer.only_cross_attention]


def _types(attentions: list[Attention]) -> str:
    return ", ".join(sorted({type(attn.processor).__name__ for attn in attentions})) or "no attention at all"
