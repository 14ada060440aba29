"""Attention, by the best kernel of the tensors' device."""

import torch

from processors.kernels.call import AttentionInputs, describe
from processors.kernels.select import select_kernel


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
    inputs = AttentionInputs(query, key, value, heads, attention_mask, is_causal, scale)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    return select_kernel(describe(inputs, needs_grad, kernels)).run(inputs)
