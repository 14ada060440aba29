# Copyright 2026 The diffusers-npu authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
The keys and values of a prompt, which are the same in every denoising step, computed once for all of them.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..attention import BasicTransformerBlock
from ..attention_processor import Attention


if TYPE_CHECKING:
    from .unet_2d_condition import UNet2DConditionModel


ProjectedPrompt = dict[str, tuple[torch.Tensor, torch.Tensor]]


def project_prompt(
    unet: "UNet2DConditionModel", prompt_embeds: torch.Tensor, cross_attention_kwargs: dict[str, Any] | None = None
) -> dict[str, Any]:
    """
    The arguments by which a UNet is given a prompt, projected if that can be done once for all calls.

    Returns:
        `projected_prompt`, the key and value of every cross-attention by the name of its block. The
        `encoder_hidden_states` themselves if the UNet has more uses for them, the processors are given arguments such
        as a LoRA scale, an attention processor or a block is not known to take projections, or hooks and replaced
        forwards may look at the prompt, move weights or cast them.
    """
    blocks = {name: module for name, module in unet.named_modules() if isinstance(module, BasicTransformerBlock)}
    if cross_attention_kwargs is not None or not _is_projectable(unet, list(blocks.values())):
        return {"encoder_hidden_states": prompt_embeds}
    projected: ProjectedPrompt = {}
    for name, block in blocks.items():
        if block.context_name != name:  # what is written anew looks changed to those who watch a model
            block.context_name = name
        projected[name] = block.attn2.project_context(prompt_embeds)
    return {"encoder_hidden_states": None, "projected_prompt": projected}


def _is_projectable(unet: "UNet2DConditionModel", blocks: list[BasicTransformerBlock]) -> bool:
    config = unet.config
    # "text_time", of SDXL, embeds the pooled prompt, which the UNet gets apart.
    if config.encoder_hid_dim_type is not None or config.addition_embed_type not in (None, "text_time"):
        return False
    if any(_has_hooks(module) or ("forward" in vars(module) and module is not unet) for module in unet.modules()):
        return False
    attentions = {id(module) for module in unet.modules() if isinstance(module, Attention)}
    return attentions == {id(attn) for block in blocks for attn in (block.attn1, block.attn2)} and all(
        # A subclass, which packages put in its place, knows nothing of projections.
        type(block) is BasicTransformerBlock
        and not block.only_cross_attention
        and block.attn2.is_cross_attention
        # Of the class itself: a promise that is inherited was not made by the `__call__` that has to keep it.
        and vars(type(block.attn2.processor)).get("takes_projected_context", False)
        for block in blocks
    )


def _has_hooks(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks or module._forward_hooks
    return bool(hooks) or hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")
