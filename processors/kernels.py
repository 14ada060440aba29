"""Attention, and the choice of the kernel that computes it.

`attention` describes a call by what is known without reading a tensor (`AttentionCall`) and runs the first kernel of
`KERNELS` whose limits all allow it. A limit is a row of data with reason and source; `explain` prints the refusals.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from ascend.device import get_chip
from processors.npu_kernels import fused_infer_attention_score, prompt_flash_attention
from processors.sliced import sliced_attention


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


A2_A3 = ("Ascend910B", "Ascend910_93")
PROMPT_DOC = "op-plugin docs/zh/custom_APIs/torch_npu/torch_npu-npu_prompt_flash_attention.md"
PROMPT_SOURCE = "ops-transformer attention/prompt_flash_attention/op_host/prompt_flash_attention_tiling.cpp"
INFER_DOC = "op-plugin docs/zh/custom_APIs/torch_npu/torch_npu-npu_fused_infer_attention_score.md"
INFER_SOURCE = "ops-transformer attention/fused_infer_attention_score/op_host/fused_infer_attention_score_def.cpp"
SDPA_SOURCE = "op-plugin op_plugin/ops/opapi/ScaledDotProductAttentionKernelNpuOpApi.cpp"

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


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    attention_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
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

    Returns:
        `[batch, query_tokens, heads * head_dim]`, dtype of `query`; zeros for a query that may see no key.
    """
    if is_causal and attention_mask is not None:
        raise ValueError("attention takes either an attention_mask or is_causal=True, not both")
    if attention_mask is not None:
        attention_mask = attention_mask[(None,) * (4 - attention_mask.ndim)]
    kernel = select_kernel(describe(query, key, heads, attention_mask, is_causal))
    return kernel.run(query, key, value, heads, attention_mask, is_causal, scale)


def describe(
    query: torch.Tensor, key: torch.Tensor, heads: int, attention_mask: torch.Tensor | None, is_causal: bool
) -> AttentionCall:
    """The description of a call of `attention` with these arguments, where `attention_mask` is None or 4-D."""
    if attention_mask is None:
        mask: Literal["none", "causal", "bool", "float"] = "causal" if is_causal else "none"
    else:
        mask = "bool" if attention_mask.dtype == torch.bool else "float"
    return AttentionCall(
        device_type=query.device.type,
        chip=_chip(query.device) if query.device.type == "npu" else None,
        dtype=query.dtype,
        batch=query.shape[0],
        heads=heads,
        query_length=query.shape[1],
        key_length=key.shape[1],
        head_dim=query.shape[-1] // heads,
        mask=mask,
        mask_heads=1 if attention_mask is None else attention_mask.shape[1],
    )


def select_kernel(call: AttentionCall) -> Kernel:
    """The first kernel of `KERNELS` whose limits all allow `call`; the last one has no limits."""
    return next(kernel for kernel in KERNELS if all(limit.allows(call) for limit in kernel.limits))


def explain(call: AttentionCall) -> str:
    """Why `select_kernel(call)` is what it is: a line for each better kernel, with the limits that ruled it out."""
    chosen = select_kernel(call)
    lines = [f"{chosen.name} for {call}"]
    for kernel in KERNELS[: KERNELS.index(chosen)]:
        refusals = [limit for limit in kernel.limits if not limit.allows(call)]
        lines += [f"  not {kernel.name}: {limit.reason} [{limit.source}]" for limit in refusals]
    return "\n".join(lines)


@torch.compiler.assume_constant_result
def _chip(device: torch.device) -> str | None:
    return get_chip(device)
