"""What of a model our kernels cover, and what not: the plan and the report of `enable_flash_attention`."""

from collections import Counter
from typing import Any, NamedTuple, Self

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from transformers import PreTrainedModel
from transformers.activations import GELUActivation

from processors.kernels import dispatch
from processors.models import clip, hidream, resnet
from processors.models.switched_attention import is_default, original_of


class Coverage(NamedTuple):
    """The layers of one model, those that ours can replace and the others by the name of what computes them."""

    model: str
    attentions: list[Attention]
    dispatching: list[Any]  # processors of other attentions, that attend through diffusers' dispatcher
    foreign_attentions: Counter[str]  # of diffusers, by their processor's class
    clip_models: list[clip.Model]  # and SigLIP's
    clip_attentions: int
    foreign_encoders: Counter[str]  # of transformers, by their implementation or class
    residual_blocks: list[ResnetBlock2D]
    foreign_blocks: int
    activations: list[GELUActivation]
    mixtures: list[MOEFeedForwardSwiGLU]
    foreign_mixtures: int

    @classmethod
    def of(cls, model: torch.nn.Module) -> Self:
        """Describe `model` without changing it."""
        modules = list(model.modules())
        of_clip = [module for module in modules if isinstance(module, clip.ATTENTIONS)]
        attentions, dispatching, foreign = [], [], Counter[str]()
        for module in modules:
            if not (hasattr(module, "set_processor") and hasattr(module, "processor")):
                continue  # as diffusers itself tells attentions, of which Flux and others have classes of their own
            original = original_of(module, module.processor)
            if isinstance(module, Attention) and is_default(module, original):
                attentions.append(module)
            elif dispatch.dispatches(original):
                dispatching.append(original)
            else:
                foreign[type(original).__name__] += 1
        encoders = Counter(a.config._attn_implementation for a in of_clip if not clip.is_replaceable(a))
        if isinstance(model, PreTrainedModel):
            encoders.update(_attention_classes(model))
        blocks = [module for module in modules if isinstance(module, ResnetBlock2D)]
        mixtures = [module for module in modules if isinstance(module, MOEFeedForwardSwiGLU)]
        is_mapped = getattr(getattr(model, "_hf_hook", None), "is_mapped", False)  # a stack would be in no file
        fusable = [mixture for mixture in mixtures if hidream.is_fusable(mixture) and not is_mapped]
        return cls(
            model=type(model).__name__,
            attentions=attentions,
            dispatching=dispatching,
            foreign_attentions=foreign,
            clip_models=[module for module in modules if isinstance(module, clip.Model)],
            clip_attentions=sum(map(clip.is_replaceable, of_clip)),
            foreign_encoders=encoders,
            residual_blocks=[block for block in blocks if resnet.is_fusable(block)],
            foreign_blocks=sum(not resnet.is_fusable(block) for block in blocks),
            activations=[module for module in modules if isinstance(module, GELUActivation)],
            mixtures=fusable,
            foreign_mixtures=len(mixtures) - len(fusable),
        )

    @property
    def others(self) -> Counter[str]:
        """The attentions that stay as they are, by the name of what computes them."""
        return self.foreign_attentions + self.foreign_encoders

    def words(self) -> str:
        """The report: what is replaced, and after "not covered:" what is not."""
        replaced = _count(len(self.attentions) + len(self.dispatching) + self.clip_attentions, "attention")
        replaced += _count(len(self.residual_blocks), "residual block") + _count(len(self.activations), "GELU")
        replaced += _count(len(self.mixtures), "mixture", "of experts")
        left = [_count(number, "attention")[0] + f" ({name})" for name, number in sorted(self.others.items())]
        left += [f"{words} that scale, shift or resample" for words in _count(self.foreign_blocks, "residual block")]
        left += [
            f"{words} with other adapters than LoRA, hooks, integer weights, or those of files"
            for words in _count(self.foreign_mixtures, "mixture", "of experts")
        ]
        if not replaced and not left:
            return f"not covered: {self.model} has none of the layers that are replaced"
        return "; ".join([", ".join(replaced)] * bool(replaced) + [f"not covered: {', '.join(left)}"] * bool(left))


def _attention_classes(model: torch.nn.Module) -> list[str]:
    """The class of each attention that is not known here, told by its name; the inner of nested ones."""
    found = []
    for module in model.modules():
        names = [type(part).__name__ for part in module.modules() if type(part).__name__.endswith("Attention")]
        if names == [type(module).__name__] and not isinstance(module, clip.ATTENTIONS):
            found += names
    return found


def _count(number: int, noun: str, rest: str = "") -> list[str]:
    return [f"{number} {noun}{'s' if number > 1 else ''} {rest}".rstrip()] if number else []
