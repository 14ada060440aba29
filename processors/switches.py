"""Switch the kernels and token merging of a pipeline, or of one of its models, on and off.

Both may be on together, in any order with each other and with diffusers' own switches, and be switched on again. Each
installed processor remembers the one it replaced, so that the `disable_` functions put back the very same objects.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from transformers.activations import GELUActivation

from processors.kernels import dispatch
from processors.kernels.select import check_kernels
from processors.merging.processor import check_ratio
from processors.models import clip, hidream, hidream_attention, resnet
from processors.models.components import components_of
from processors.models.coverage import Coverage
from processors.models.self_attentions import self_attentions
from processors.models.switched_attention import is_default, original_of, stripped, switch, switches_of

logger = logging.getLogger(__name__)


def enable_fused_kernels(
    pipe: DiffusionPipeline | torch.nn.Module, kernels: Sequence[str] | None = None
) -> dict[str, str]:
    """Let every model of `pipe` attend through `processors.kernels`, and use the exact fused kernels of an NPU.

    Replaces diffusers' default attention processor, with fused projections or without, in the UNet, the VAE and
    whatever else has one, the backend of processors that attend through diffusers' dispatcher (Flux, Stable Diffusion
    3 and other transformers), torch's attention in CLIP and SigLIP models, GroupNorm followed by SiLU in residual
    blocks, the GELU of transformers, and HiDream's norms, rotary embeddings and mixtures of experts, whose weights it
    stacks. Which kernel runs is decided at each call by the device of its tensors, so the pipeline may be moved
    afterwards; off the NPU, results do not change by a bit. Other processors stay, with a warning, and so does a
    backend of the dispatcher that `set_attention_backend` chose; one that the context manager `attention_backend`
    chooses is overruled. Called again, it replaces the old choice of kernels.

    Args:
        pipe: a pipeline, or a model such as a UNet, a VAE or a CLIP model.
        kernels: names of the attention kernels to choose from (`processors.kernel_names`), in case one of them
            fails on a card; the best of them that can compute a call is taken, and sliced attention where none can.
            None: all of them.

    Returns:
        What was done in each model, by the component's name, or the model's class: "2 attentions, 22 residual blocks",
        and what was not: "not covered: 57 attentions (FluxAttnProcessor)".

    Raises:
        ValueError: no such kernel, or no attention of `pipe` can run on ours. Nothing has changed then.
    """
    names = check_kernels(kernels)
    found = {name: Coverage.of(model) for name, model in components_of(pipe).items()}
    covered = any(coverage.attentions or coverage.dispatching for coverage in found.values())
    foreign = any(coverage.foreign_attentions for coverage in found.values())
    has_clip = any(coverage.clip_attentions for coverage in found.values())
    if not covered and (foreign or not has_clip):
        types = sorted({name for coverage in found.values() for name in coverage.others})
        raise ValueError(
            f"no attention of {type(pipe).__name__} has diffusers' AttnProcessor2_0: "
            f"found {', '.join(types) or 'no attention at all'}"
        )

    for name, coverage in found.items():
        if coverage.foreign_attentions:
            logger.warning(
                "enable_flash_attention leaves these attention processors as they are: %s (of %s)",
                ", ".join(sorted(coverage.foreign_attentions)),
                name,
            )
        for attn in coverage.attentions:
            switch(attn, flash=True, kernels=names)
        for processor in coverage.dispatching:
            dispatch.use_kernels(processor, names)
            hidream_attention.fuse(processor)
        for block in coverage.residual_blocks:
            resnet.fuse(block)
        for clip_model in coverage.clip_models:
            clip.use_kernels(clip_model, names)
        for activation in coverage.activations:
            clip.use_exact_gelu(activation)
        for mixture in coverage.mixtures:
            hidream.fuse(mixture)
    return {name: coverage.words() for name, coverage in found.items()}


def disable_fused_kernels(pipe: DiffusionPipeline | torch.nn.Module) -> None:
    """Undo `enable_fused_kernels`; does nothing where it was not enabled."""
    for attn in _attentions(pipe):
        switch(attn, flash=False, kernels=None)
    _forget_processors(pipe)
    _forget_backends(pipe)
    for module in _modules(pipe):
        if isinstance(module, resnet.FusedResnetBlock2D):
            resnet.unfuse(module)
        elif isinstance(module, hidream.FusedMoE):
            hidream.unfuse(module)
        elif isinstance(module, clip.Model):
            clip.use_default(module)
        elif isinstance(module, GELUActivation):
            clip.use_default_gelu(module)


def uses_fused_kernels(pipe: DiffusionPipeline | torch.nn.Module) -> bool:
    """Whether `enable_fused_kernels` is in effect in any part of `pipe`."""
    return (
        any(switches_of(attn).flash for attn in _attentions(pipe))
        or any(dispatch.is_ours(getattr(module, "processor", None)) for module in _modules(pipe))
        or any(isinstance(module, resnet.FusedResnetBlock2D | hidream.FusedMoE) for module in _modules(pipe))
        or any(clip.uses_kernels(module) for module in _modules(pipe) if isinstance(module, clip.Model))
    )


# By the flag --FA of the runners.
enable_flash_attention, disable_flash_attention = enable_fused_kernels, disable_fused_kernels


def enable_token_merging(
    pipe: DiffusionPipeline | torch.nn.Module, ratio: float = 0.5, max_downsample: int | None = None
) -> dict[str, str]:
    """Merge `ratio` of the tokens in self-attentions of the UNet of `pipe`. Called again, it replaces the old setting.

    Args:
        pipe: a pipeline with a UNet2DConditionModel, or such a UNet.
        ratio: share of the tokens to remove, from 0 to 0.75.
        max_downsample: 1, 2, 4, ...: merge in every block whose resolution is at least 1 / max_downsample of the
            latents'. None: in the outermost down block with attention, which is the first of Stable Diffusion, and in
            the first two layers of the outermost such up block.

    Returns:
        What was done in the UNet, by the component's name, or the model's class, and which models were left out.

    Raises:
        ValueError: no 2D UNet, no such block, `ratio` out of range, or a block whose attention processor is not
            diffusers' default. Nothing has changed then.
    """
    check_ratio(ratio)
    unet = _unet(pipe)
    chosen = self_attentions(unet, max_downsample)
    if not chosen:
        advice = "try a larger one" if max_downsample is not None else "try max_downsample=8"
        raise ValueError(f"the UNet has no self-attention at max_downsample={max_downsample}: {advice}")
    others = [attn for attn in chosen if not is_default(attn, original_of(attn, attn.processor))]
    if others:
        raise ValueError(f"token merging replaces diffusers' AttnProcessor2_0 only: found {_types(others)}")

    merging = {id(attn) for attn in chosen}
    for attn in _attentions(unet):
        switch(attn, ratio=ratio if id(attn) in merging else None)
    report = {}
    for name, model in components_of(pipe).items():
        blocks = [module for module in model.modules() if isinstance(module, BasicTransformerBlock)]
        if getattr(model, "_orig_mod", model) is unet:
            report[name] = f"{len(chosen)} of {len(blocks)} self-attentions merge {ratio:.0%} of their tokens"
        elif blocks:
            report[name] = f"not covered: token merging is for a UNet2DConditionModel, not for {type(model).__name__}"
    return report


def disable_token_merging(pipe: DiffusionPipeline | torch.nn.Module) -> None:
    """Undo `enable_token_merging`; does nothing where it was not enabled."""
    for attn in _attentions(pipe):
        switch(attn, ratio=None)
    _forget_processors(pipe)


def merging_ratios(pipe: DiffusionPipeline | torch.nn.Module) -> list[float]:
    """The share of its tokens that each self-attention with token merging merges."""
    ratios = (switches_of(attn).ratio for attn in _attentions(pipe))
    return [ratio for ratio in ratios if ratio is not None]


def _forget_processors(pipe: DiffusionPipeline | torch.nn.Module) -> None:
    """Where diffusers fused the projections it kept our processors, and would put them back."""
    for kept in _kept_processors(pipe):
        kept.update({name: stripped(processor) for name, processor in kept.items()})


def _forget_backends(pipe: DiffusionPipeline | torch.nn.Module) -> None:
    """Those of processors in use, and of those that diffusers would put back, and HiDream's fused operators."""
    kept = [processor for processors in _kept_processors(pipe) for processor in processors.values()]
    for processor in (*(getattr(module, "processor", None) for module in _modules(pipe)), *kept):
        dispatch.use_default(processor)
        hidream_attention.unfuse(processor)


def _kept_processors(pipe: DiffusionPipeline | torch.nn.Module) -> list[dict[str, Any]]:
    """What `fuse_qkv_projections` keeps in each model, by the names of the attentions."""
    return [vars(module).get("original_attn_processors") or {} for module in _modules(pipe)]


def _modules(pipe: DiffusionPipeline | torch.nn.Module) -> Iterator[torch.nn.Module]:
    for component in components_of(pipe).values():
        yield from component.modules()


def _attentions(pipe: DiffusionPipeline | torch.nn.Module) -> list[Attention]:
    return [module for module in _modules(pipe) if isinstance(module, Attention)]


def _unet(pipe: DiffusionPipeline | torch.nn.Module) -> UNet2DConditionModel:
    is_model = isinstance(pipe, torch.nn.Module)
    unet = pipe if is_model else getattr(pipe, "unet", None)
    unet = getattr(unet, "_orig_mod", unet)  # what torch.compile wrapped
    if not isinstance(unet, UNet2DConditionModel):
        lack = "is none" if is_model else "has none as .unet"
        raise ValueError(f"token merging needs a UNet2DConditionModel, but {type(pipe).__name__} {lack}")
    return unet


def _types(attentions: list[Attention]) -> str:
    return ", ".join(sorted({type(attn.processor).__name__ for attn in attentions}))
