"""Attention, and the choice of the kernel that computes it.

`attention` describes a call by what is known without reading a tensor (`AttentionCall`) and runs the first kernel of
`KERNELS` whose limits all allow it. A limit is a row of data with reason and source; `explain` prints the refusals.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from ascend.device import get_chip
from processors.kernels.npu_attention import fused_infer_attention_score, fusion_attention, prompt_flash_attention
from processors.kernels.sliced import sliced_attention


class AttentionCall(NamedTuple):
    """All that the choice of a kernel depends on."""

    device_type: str
    chip: str | None
    dtype: torch.dtype
    batch: int
    heads: int
    query_length: int
    key_length: int
    head_dim: int
    mask: Literal["none", "causal", "bool", "float"] = "none"
    mask_heads: int = 1
    needs_grad: bool = False
    kernels: tuple[str, ...] | None = None  # those that the user allows, beside the last one; None: all


class Limit(NamedTuple):
    """One condition of a kernel: `allows(call)` is false where the kernel fails or gives a wrong result."""

    reason: str
    source: str
    allows: Callable[[AttentionCall], bool]


class Kernel(NamedTuple):
    name: str
    run: Callable[..., torch.Tensor]
    limits: tuple[Limit, ...]


def torch_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    attention_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """`F.scaled_dot_product_attention` on [batch, tokens, heads * head_dim]."""
    query, key, value = (tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in (query, key, value))
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, is_causal=is_causal, scale=scale
    )
    return output.transpose(1, 2).flatten(2)


A2_A3 = (*(f"Ascend910B{digit}" for digit in range(1, 10)), "Ascend910_93")  # "Ascend910B" alone is older than A2
PROMPT_DOC = "op-plugin docs/zh/custom_APIs/torch_npu/torch_npu-npu_prompt_flash_attention.md"
PROMPT_SOURCE = "ops-transformer attention/prompt_flash_attention/op_host/prompt_flash_attention_tiling.cpp"
INFER_DOC = "op-plugin docs/zh/custom_APIs/torch_npu/torch_npu-npu_fused_infer_attention_score.md"
INFER_SOURCE = "ops-transformer attention/fused_infer_attention_score/op_host/fused_infer_attention_score_def.cpp"
FUSION_DOC = "op-plugin docs/zh/custom_APIs/torch_npu/torch_npu-npu_fusion_attention.md"
FUSION_SOURCE = "ops-transformer attention/flash_attention_score/op_host/flash_attention_score_def.cpp"
DERIVATIVES = "op-plugin op_plugin/config/derivatives.yaml"
SDPA_SOURCE = "op-plugin op_plugin/ops/opapi/ScaledDotProductAttentionKernelNpuOpApi.cpp"
NO_DERIVATIVE = Limit("has no derivative, and a gradient is needed", DERIVATIVES, lambda call: not call.needs_grad)

KERNELS = (
    Kernel(
        "npu_prompt_flash_attention",
        prompt_flash_attention,
        (
            Limit("an operator of NPUs", PROMPT_DOC, lambda call: call.device_type == "npu"),
            Limit(
                "taken on Ascend310P alone, which has no other fused attention",
                PROMPT_DOC,
                lambda call: call.chip is not None and call.chip.startswith("Ascend310P"),
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
        "npu_fused_infer_attention_score",
        fused_infer_attention_score,
        (
            Limit("an operator of NPUs", INFER_DOC, lambda call: call.device_type == "npu"),
            Limit(
                "Ascend910B (A2) and Ascend910_93 (A3) only: other chips have no such kernel",
                INFER_SOURCE,
                lambda call: call.chip is not None and call.chip.startswith(A2_A3),
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
        "npu_fusion_attention",
        fusion_attention,
        (
            Limit("an operator of NPUs", FUSION_DOC, lambda call: call.device_type == "npu"),
            Limit(
                "Ascend910B (A2) and Ascend910_93 (A3) only: other chips have no such kernel",
                FUSION_SOURCE,
                lambda call: call.chip is not None and call.chip.startswith(A2_A3),
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
        "scaled_dot_product_attention",
        torch_attention,
        (
            Limit(
                "on an NPU, fused on A2, A3 and 950 chips only: elsewhere it holds all scores at once",
                SDPA_SOURCE,
                lambda call: (
                    call.device_type != "npu"
                    or (call.chip is not None and call.chip.startswith((*A2_A3, "Ascend950")))
                ),
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
SHORT_NAMES = {"sdpa": "scaled_dot_product_attention", "sliced": "sliced_attention"}


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


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    attention_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    kernels: tuple[str, ...] | None = None,
) -> torch.Tensor:
    """Attention of `query` over `key` and `value`, computed by the best kernel of the tensors' device.

    Args:
        query: `[batch, query_tokens, heads * head_dim]`, any floating dtype.
        key, value: `[batch, key_tokens, heads * head_dim]`, of the same dtype.
        heads: number of heads, which lie side by side in the last dimension.
        attention_mask: broadcasts to `[batch, heads, query_tokens, key_tokens]`; boolean, True where a query may see
            a key, or a float bias that is added to the scores, as in `F.scaled_dot_product_attention`.
        is_causal: hide the keys after each query's own position; not together with `attention_mask`.
        scale: factor of the scores, `head_dim ** -0.5` if None.
        kernels: what `check_kernels` made of the user's choice. Where none of them can compute this call, the last
            resort, sliced attention, does.

    Returns:
        `[batch, query_tokens, heads * head_dim]`, dtype of `query`; zeros for a query that may see no key.
    """
    if is_causal and attention_mask is not None:
        raise ValueError("attention takes either an attention_mask or is_causal=True, not both")
    if attention_mask is not None:
        attention_mask = attention_mask[(None,) * (4 - attention_mask.ndim)]
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    kernel = select_kernel(describe(query, key, heads, attention_mask, is_causal, needs_grad, kernels))
    return kernel.run(query, key, value, heads, attention_mask, is_causal, scale)


def describe(
    query: torch.Tensor,
    key: torch.Tensor,
    heads: int,
    attention_mask: torch.Tensor | None,
    is_causal: bool,
    needs_grad: bool = False,
    kernels: tuple[str, ...] | None = None,
) -> AttentionCall:
    """The description of a call of `attention` with these arguments, where `attention_mask` is None or 4-D."""
    if attention_mask is None:
        mask: Literal["none", "causal", "bool", "float"] = "causal" if is_causal else "none"
    else:
        mask = "bool" if attention_mask.dtype == torch.bool else "float"
    return AttentionCall(
        device_type=query.device.type,
        chip=chip_of(query.device),
        dtype=query.dtype,
        batch=query.shape[0],
        heads=heads,
        query_length=query.shape[1],
        key_length=key.shape[1],
        head_dim=query.shape[-1] // heads,
        mask=mask,
        mask_heads=1 if attention_mask is None else attention_mask.shape[1],
        needs_grad=needs_grad,
        kernels=kernels,
    )


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


def chip_of(device: torch.device) -> str | None:
    """`ascend.device.get_chip`, for code that is compiled."""
    return _chip(device) if device.type == "npu" else None


def _is_asked_for(kernel: Kernel, call: AttentionCall) -> bool:
    return call.kernels is None or kernel.name in call.kernels or kernel is LAST_RESORT


@torch.compiler.assume_constant_result
def _chip(device: torch.device) -> str | None:
    return get_chip(device)
