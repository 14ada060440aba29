"""Where a UNet has its self-attentions, and over how many tokens."""

from collections.abc import Iterator

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from processors.kernels.call import AttentionCall, chip_of
from processors.merging.processor import AttnProcessor2_0Tome
from processors.merging.tome import count_merged
from processors.models.attention_processor import AttnProcessor2_0


def self_attentions(unet: UNet2DConditionModel, max_downsample: int | None) -> list[Attention]:
    """The self-attentions of every block whose resolution is at least 1 / max_downsample of the latents'.

    None: those of the outermost down block that has any, and of the first two layers of such an up block. In Stable
    Diffusion 2.1 these are the first and the last.
    """
    if max_downsample is not None:
        return [attn for block, level in _blocks(unet) if 2**level <= max_downsample for attn in _within(block)]
    down = next((block for block in unet.down_blocks if _within(block)), None)
    up = next((block for block in reversed(unet.up_blocks) if _within(block)), None)
    layers = list(getattr(up, "attentions", []))[:2]
    return [attn for block in (down, *layers) for attn in _within(block)]


def largest_call(
    unet: UNet2DConditionModel, batch: int, height: int, width: int, device: torch.device | None = None
) -> AttentionCall:
    """The self-attention of `unet` over the most tokens, as `enable_flash_attention` computes it.

    Args:
        batch: samples of one call of the UNet: with guidance, twice the pictures.
        height, width: of the latents.
        device: where the UNet will run, if not where its weights are now.

    Raises:
        ValueError: the UNet has no self-attention.
    """
    device = device or unet.device
    calls = []
    for block, level in _blocks(unet):
        h, w = -(-height // 2**level), -(-width // 2**level)
        for attn in _within(block):
            tokens, processor = h * w, attn.processor
            if isinstance(processor, AttnProcessor2_0Tome):
                tokens -= count_merged(h, w, processor.sy, processor.sx, processor.ratio)
            is_ours = isinstance(processor, (AttnProcessor2_0, AttnProcessor2_0Tome))
            call = AttentionCall(
                device_type=device.type,
                chip=chip_of(device),
                dtype=unet.dtype,
                batch=batch,
                heads=attn.heads,
                query_length=tokens,
                key_length=tokens,
                head_dim=attn.inner_dim // attn.heads,
                kernels=processor.kernels if is_ours else None,
            )
            calls.append(call)
    if not calls:
        raise ValueError(f"{type(unet).__name__} has no self-attention")
    return max(calls, key=lambda call: call.query_length)


def _blocks(unet: UNet2DConditionModel) -> Iterator[tuple[torch.nn.Module | None, int]]:
    """The blocks in the order in which they run, and how often the resolution of each was halved."""
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    deepest = len(unet.down_blocks) - 1
    for index, block in enumerate(blocks):
        yield block, min(index, len(blocks) - 1 - index, deepest)


def _within(block: torch.nn.Module | None) -> list[Attention]:
    transformers = [] if block is None else [m for m in block.modules() if isinstance(m, BasicTransformerBlock)]
    return [transformer.attn1 for transformer in transformers if not transformer.only_cross_attention]
