"""Which kernel computes an attention.

The first of `KERNELS` is taken whose limits all allow the call. `explain` prints the refusals.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ascend.chips import FUSION_ATTENTION, INFER_ATTENTION, PROMPT_ATTENTION, TORCH_ATTENTION, has_operator
from processors.kernels.call import AttentionCall, AttentionInputs
from processors.kernels.limit import Limit
from processors.kernels.npu_attention import fused_infer_attention_score, fusion_attention, prompt_flash_attention
from processors.kernels.sliced import sliced_attention
from processors.kernels.torch_attention import torch_attention


class Kernel(NamedTuple):
    name: str
    run: Callable[[AttentionInputs], torch.Tensor]
    limits: tuple[Limit[AttentionCall], ...]


PROMPT_DOC = "op-plugin docs/zh/custom_APIs/torch_npu/torch_npu-npu_prompt_flash_attention.md"
PROMPT_SOURCE = "ops-transformer attention/prompt_flash_attention/op_host/prompt_flash_attention_tiling.cpp"
INFER_DOC = "op-plugin docs/zh/custom_APIs/torch_npu/torch_npu-npu_fused_infer_attention_score.md"
INFER_SOURCE = "ops-transformer attention/fused_infer_attention_score/op_host/fused_infer_attention_score_def.cpp"
FUSION_DOC = "op-plugin docs/zh/custom_APIs/torch_npu/torch_npu-npu_fusion_attention.md"
FUSION_SOURCE = "ops-transformer attention/flash_attention_score/op_host/flash_attention_score_def.cpp"
DERIVATIVES = "op-plugin op_plugin/config/derivatives.yaml"
SDPA_SOURCE = "op-plugin op_plugin/ops/opapi/ScaledDotProductAttentionKernelNpuOpApi.cpp"
NO_DERIVATIVE: Limit[AttentionCall] = Limit(
    "has no derivative, and a gradient is needed", DERIVATIVES, lambda call: not call.needs_grad
)

KERNELS = (
    Kernel(
        PROMPT_ATTENTION,
        prompt_flash_attention,
        (
            Limit("an operator of NPUs", PROMPT_DOC, lambda call: call.device_type == "npu"),
            Limit(
                "taken on Ascend310P alone, which has no other fused attention",
                PROMPT_DOC,
                lambda call: has_operator(call.chip, PROMPT_ATTENTION),
            ),
            NO_DERIVATIVE,
            Limit("310P: float16 only", PROMPT_DOC, lambda call: call.dtype == torch.float16),
            Limit("310P: batch of at most 128", f"{PROMPT_SOURCE}:4486", lambda call: call.batch <= 128),
            Limit("at most 256 heads", PROMPT_DOC, lambda call: call.heads <= 256),
            Limit("head_dim of at most 512", PROMPT_DOC, lambda call: call.head_dim <= 512),
            Limit(
                "310P: at most 65535 tokens",
                PROMPT_DOC,
                lambda call: max(call.query_length, call.key_length) <= 65535,
            ),
            Limit("the mask is boolean, not a float bias", f"{PROMPT_SOURCE}:5723", lambda call: call.mask != "float"),
            Limit("one mask for all heads", PROMPT_DOC, lambda call: call.mask_heads == 1),
            Limit(
                "310P: with a mask, as many keys as queries",
                f"{PROMPT_SOURCE}:4291",
                lambda call: call.mask == "none" or call.query_length == call.key_length,
            ),
        ),
    ),
    Kernel(
        INFER_ATTENTION,
        fused_infer_attention_score,
        (
            Limit("an operator of NPUs", INFER_DOC, lambda call: call.device_type == "npu"),
            Limit(
                "Ascend910B (A2) and Ascend910_93 (A3) only: other chips have no such kernel",
                INFER_SOURCE,
                lambda call: has_operator(call.chip, INFER_ATTENTION),
            ),
            NO_DERIVATIVE,
            Limit("float16 or bfloat16", INFER_DOC, lambda call: call.dtype in (torch.float16, torch.bfloat16)),
            Limit("batch of at most 65536", INFER_DOC, lambda call: call.batch <= 65536),
            Limit("at most 256 heads", INFER_DOC, lambda call: call.heads <= 256),
            Limit(
                "head_dim a multiple of 16, at most 512",
                INFER_DOC,
                lambda call: call.head_dim % 16 == 0 and call.head_dim <= 512,
            ),
            Limit("the mask is boolean, not a float bias", INFER_DOC, lambda call: call.mask != "float"),
            Limit("one mask for all heads", INFER_DOC, lambda call: call.mask_heads == 1),
        ),
    ),
    Kernel(
        FUSION_ATTENTION,
        fusion_attention,
        (
            Limit("an operator of NPUs", FUSION_DOC, lambda call: call.device_type == "npu"),
            Limit(
                "Ascend910B (A2) and Ascend910_93 (A3) only: other chips have no such kernel",
                FUSION_SOURCE,
                lambda call: has_operator(call.chip, FUSION_ATTENTION),
            ),
            # The one of these operators with a derivative, which the others' speed does not need: it also writes the
            # statistics of the softmax for the backward pass.
            Limit(
                "for training: taken where a gradient is needed, and not documented for graphs",
                FUSION_DOC,
                lambda call: call.needs_grad,
            ),
            Limit(
                "float16, bfloat16 or float32",
                FUSION_DOC,
                lambda call: call.dtype in (torch.float16, torch.bfloat16, torch.float32),
            ),
            Limit("batch of at most 2 million", FUSION_DOC, lambda call: call.batch <= 2_000_000),
            Limit("at most 256 heads", FUSION_DOC, lambda call: call.heads <= 256),
            Limit("head_dim of at most 768", FUSION_DOC, lambda call: call.head_dim <= 768),
            Limit(
                "at most a million tokens",
                FUSION_DOC,
                lambda call: max(call.query_length, call.key_length) <= 1_000_000,
            ),
            Limit("the mask is boolean, not a float bias", FUSION_DOC, lambda call: call.mask != "float"),
        ),
    ),
    Kernel(
        TORCH_ATTENTION,
        torch_attention,
        (
            Limit(
                "on an NPU, fused on A2, A3 and 950 chips only: elsewhere it holds all scores at once",
                SDPA_SOURCE,
                lambda call: call.device_type != "npu" or has_operator(call.chip, TORCH_ATTENTION),
            ),
            Limit(
                "on an NPU, a float bias makes it hold all scores at once",
                SDPA_SOURCE,
                lambda call: call.device_type != "npu" or call.mask != "float",
            ),
            Limit(
                "on an NPU, head_dim of at most 512, in float32 a multiple of 4",
                SDPA_SOURCE,
                lambda call: (
                    call.device_type != "npu"
                    or (call.head_dim <= 512 and (call.dtype != torch.float32 or call.head_dim % 4 == 0))
                ),
            ),
        ),
    ),
    Kernel("sliced_attention", sliced_attention, ()),
)
LAST_RESORT = KERNELS[-1]  # which has no limits
SHORT_NAMES = {"sdpa": TORCH_ATTENTION, "sliced": "sliced_attention"}


def kernel_names() -> tuple[str, ...]:
    """The names that `check_kernels` takes, best kernel first, then the short ones."""
    return (*(kernel.name for kernel in KERNELS), *SHORT_NAMES)


def check_kernels(names: Sequence[str] | None) -> tuple[str, ...] | None:
    """`names` in full and in the order of `KERNELS`; None, which stands for all of them, as it is.

    Raises:
        ValueError: no name at all, or one that is not in `kernel_names()`.
    """
    if names is None:
        return None
    names = [names] if isinstance(names, str) else names
    unknown = [name for name in names if name not in kernel_names()]
    if unknown or not names:
        asked = f"no attention kernel is called {unknown[0]!r}" if unknown else "kernels= names no attention kernel"
        raise ValueError(f"{asked}: choose from {', '.join(kernel_names())}")
    chosen = {SHORT_NAMES.get(name, name) for name in names}
    return tuple(kernel.name for kernel in KERNELS if kernel.name in chosen)


def select_kernel(call: AttentionCall) -> Kernel:
    """The first kernel of `KERNELS` that the user and all its limits allow; the last resort is always allowed."""
    return next(
        kernel
        for kernel in KERNELS
        if _is_asked_for(kernel, call) and all(limit.allows(call) for limit in kernel.limits)
    )


def explain(call: AttentionCall) -> str:
    """Why `select_kernel(call)` is what it is: a line for each better kernel, with the limits that ruled it out."""
    chosen = select_kernel(call)
    lines = [f"{chosen.name} for {call}"]
    for kernel in KERNELS[: KERNELS.index(chosen)]:
        refusals = [limit for limit in kernel.limits if not limit.allows(call)]
        lines += [f"  not {kernel.name}: {limit.reason} [{limit.source}]" for limit in refusals]
        if not _is_asked_for(kernel, call):
            lines.append(f"  not {kernel.name}: not among the kernels asked for")
    return "\n".join(lines)


def _is_asked_for(kernel: Kernel, call: AttentionCall) -> bool:
    return call.kernels is None or kernel.name in call.kernels or kernel is LAST_RESORT
