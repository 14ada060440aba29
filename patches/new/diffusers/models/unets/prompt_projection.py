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

from typing import TYPE_CHECKING

import torch

from ..attention import BasicTransformerBlock
from ..attention_processor import Attention


if TYPE_CHECKING:
    from .unet_2d_condition import UNet2DConditionModel


ProjectedPrompt = dict[str, tuple[torch.Tensor, torch.Tensor]]


def project_prompt(
    unet: "UNet2DConditionModel", encoder_hidden_states: torch.Tensor
) -> ProjectedPrompt | torch.Tensor:
    """
    What a UNet takes as `encoder_hidden_states`, so that it need not project them in each call.

    Returns:
        The key and value of every cross-attention by the name of its block. The `encoder_hidden_states` themselves if
        the UNet has more uses for them, an attention processor or a block that is not known to take projections, or
        hooks that move or cast weights around a call.
    """
    blocks = {name: module for name, module in unet.named_modules() if isinstance(module, BasicTransformerBlock)}
    if not _is_projectable(unet, list(blocks.values())):
        return encoder_hidden_states
    projected = {}
    for name, block in blocks.items():
        block.context_name = name
        projected[name] = block.attn2.project_context(encoder_hidden_states)
    return projected


def _is_projectable(unet: "UNet2DConditionModel", blocks: list[BasicTransformerBlock]) -> bool:
    config = unet.config
    if config.encoder_hid_dim_type is not None or config.addition_embed_type is not None:
        return False
    if any(hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook") for module in unet.modules()):
        return False
    attentions = {id(module) for module in unet.modules() if isinstance(module, Attention)}
    return attentions == {id(attn) for block in blocks for attn in (block.attn1, block.attn2)} and all(
        # A subclass, which packages put in its place, knows nothing of projections.
        type(block) is BasicTransformerBlock
        and not block.only_cross_attention
        and block.attn2.is_cross_attention
        and getattr(block.attn2.processor, "takes_projected_context", False)
        for block in blocks
    )
