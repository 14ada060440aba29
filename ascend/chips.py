"""Ascend chips: the one list of what each family computes in, and which fused operators it has.

A chip's name is CANN's: the family and a number, as "Ascend310P3".
"""

from __future__ import annotations

from typing import NamedTuple

import torch

PROMPT_ATTENTION = "npu_prompt_flash_attention"
INFER_ATTENTION = "npu_fused_infer_attention_score"
FUSION_ATTENTION = "npu_fusion_attention"
TORCH_ATTENTION = "scaled_dot_product_attention"  # without holding all scores at once
TOKEN_MERGING = "npu_tome_merge"
ADD_LAYER_NORM = "npu_add_layer_norm"
WEIGHT_QUANT_MATMUL = "npu_weight_quant_batchmatmul"
GROUPED_MATMUL = "npu_grouped_matmul"
EXPERT_ROUTING = "npu_moe_gating_top_k_softmax"  # and npu_moe_finalize_routing; 310P routes by fewer operators
ROTARY = "npu_apply_rotary_pos_emb"


class Family(NamedTuple):
    """Chips that take the same calls.

    Attributes:
        prefixes: of the names of its chips.
        dtypes: the floating ones that it computes in, the best for inference first.
        saturates: an overflow gives the largest number and not infinity.
        operators: those fused operators that some chips have and others lack.
    """

    name: str
    prefixes: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    saturates: bool
    operators: frozenset[str]


HALF = (torch.float16, torch.float32)
BFLOAT16 = (torch.bfloat16, torch.float16, torch.float32)
# dtypes and saturation: what torch_npu's is_bf16_supported and is_support_inf_nan answer (Ascend/pytorch,
# torch_npu/npu/utils.py). Operators: the chips that the operator's definition in hicann/ops-transformer names, or its
# page in op-plugin; scaled_dot_product_attention: op-plugin, ScaledDotProductAttentionKernelNpuOpApi.cpp;
# npu_add_layer_norm: hicann/ops-nn, norm/add_layer_norm/docs/aclnnAddLayerNorm.md and its definition.
TRAINING_CHIPS = frozenset(
    {
        INFER_ATTENTION,
        FUSION_ATTENTION,
        TORCH_ATTENTION,
        WEIGHT_QUANT_MATMUL,
        GROUPED_MATMUL,
        EXPERT_ROUTING,
        ROTARY,
        ADD_LAYER_NORM,
    }
)
FAMILIES = (
    Family(
        "310P",
        ("Ascend310P",),
        HALF,
        True,
        frozenset({PROMPT_ATTENTION, TOKEN_MERGING, WEIGHT_QUANT_MATMUL, GROUPED_MATMUL, ROTARY, ADD_LAYER_NORM}),
    ),
    Family(
        "A2",
        tuple(f"Ascend910B{digit}" for digit in range(1, 10)),  # "Ascend910B" alone is older
        BFLOAT16,
        False,
        TRAINING_CHIPS,
    ),
    Family(
        "A3",
        ("Ascend910_93",),
        BFLOAT16,
        False,
        TRAINING_CHIPS,
    ),
    Family("950", ("Ascend950",), BFLOAT16, False, frozenset({TORCH_ATTENTION, ADD_LAYER_NORM})),
)


def family_of(chip: str | None) -> Family | None:
    """The family of the chip that CANN calls so; None for an unknown one, or none."""
    return next((family for family in FAMILIES if chip is not None and chip.startswith(family.prefixes)), None)


def has_operator(chip: str | None, operator: str) -> bool:
    """Whether the chip is known to have a fused operator, one of this module's names."""
    family = family_of(chip)
    return family is not None and operator in family.operators
