"""What our switches ask of an attention module, kept where diffusers' own switches do not lose it.

Those replace processors wholesale: `fuse_qkv_projections`, `enable_attention_slicing`, an IP-Adapter, LoRA loaders. So
what `enable_flash_attention` and `enable_token_merging` ask for is kept on the module, and applied anew to whatever
processor is set: diffusers' default ones are replaced, any other computes what it was made for.
"""

import warnings
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from diffusers.models.attention_processor import AttnProcessor2_0 as DefaultAttnProcessor

from processors.merging.processor import AttnProcessor2_0Tome
from processors.models.attention_processor import AttnProcessor2_0


class Switches(NamedTuple):
    """All that is switched on in one attention module."""

    flash: bool = False
    kernels: tuple[str, ...] | None = None  # those that flash attention chooses from, None for all
    ratio: float | None = None  # of the tokens that merge


class SwitchedAttention(Attention):
    """`Attention` in which something is switched on. `switch` turns a module into one and back; all else stays."""

    switches: Switches

    def set_processor(self, processor: Any) -> None:
        """As diffusers' `set_processor`, which all of its own switches call."""
        chosen = original_of(self, processor)
        if _is_ours_anew(chosen, self.switches):
            chosen = DefaultAttnProcessor()
        if not is_default(self, chosen):
            # Once for each place in the code, and not for each of the modules that it sets.
            warnings.warn(
                f"{type(chosen).__name__} computes an attention from now on: neither the kernels of "
                "enable_flash_attention nor token merging are in effect there until it is taken away",
                stacklevel=2,
            )
        self.install(chosen)

    def install(self, original: Any) -> None:
        """Let this module attend as it is switched, in place of `original`."""
        super().set_processor(_processor_for(self, original))


def switch(attn: Attention, **changes: Any) -> None:
    """Change what is switched on in `attn`; fields as in `Switches`. All off, it is as if it had never been switched.

    Where someone replaced our processor in the meantime, theirs stays.
    """
    original, current = original_of(attn, attn.processor), switches_of(attn)
    switches = current._replace(**changes)
    if switches == Switches():
        if isinstance(attn, SwitchedAttention):
            attn.__class__ = Attention
            del attn.switches
        if original is not attn.processor:
            attn.set_processor(original)
    elif switches != current:
        attn.__class__ = SwitchedAttention
        attn.switches = switches
        attn.install(original)


def switches_of(attn: Attention) -> Switches:
    return attn.switches if isinstance(attn, SwitchedAttention) else Switches()


def stripped(processor: Any) -> Any:
    """`processor`, or the one that a switch replaced by it."""
    while isinstance(processor, (AttnProcessor2_0, AttnProcessor2_0Tome)) and processor.replaced is not None:
        processor = processor.replaced
    return processor


def original_of(attn: torch.nn.Module, processor: Any) -> Any:
    """What `processor` stands for in `attn`: itself, or the one that a switch replaced by it.

    Where diffusers fused the projections since, or took that back, it is the like of the one that was replaced.
    """
    original = stripped(processor)
    if original is not processor and type(original) in (DefaultAttnProcessor, FusedAttnProcessor2_0):
        now = FusedAttnProcessor2_0 if attn.fused_projections else DefaultAttnProcessor
        return original if type(original) is now else now()
    return original


def is_default(attn: Attention, original: Any) -> bool:
    """Whether ours can replace `original`, a processor of `attn`: not a subclass, which may do more."""
    if type(attn) not in (Attention, SwitchedAttention):
        return False
    if type(original) is FusedAttnProcessor2_0:
        return bool(attn.fused_projections)
    return type(original) in (DefaultAttnProcessor, AttnProcessor2_0)


def _processor_for(attn: SwitchedAttention, original: Any) -> Any:
    if not is_default(attn, original):
        return original
    _, kernels, ratio = attn.switches
    processor = AttnProcessor2_0(kernels) if ratio is None else AttnProcessor2_0Tome(ratio=ratio, kernels=kernels)
    processor.replaced = original
    return processor


def _is_ours_anew(processor: Any, switches: Switches) -> bool:
    """Whether `processor` is new and one of the classes that a switch installs.

    `load_ip_adapter` and `unload_ip_adapter` make new processors of the old ones' classes, without their settings.
    """
    installed = (AttnProcessor2_0,) if switches.ratio is None else (AttnProcessor2_0, AttnProcessor2_0Tome)
    return type(processor) in installed and vars(processor) == vars(type(processor)())
