"""The fused attention operators of Ascend chips.

All take [batch, tokens, heads * head_dim], default to scale 1, and read True in a mask as "masked out", the opposite
of torch. Two are made for inference and have no derivative, the third is made for training. They are called as
`torch.ops.npu`, which exists wherever there is an NPU tensor.
"""

import torch

from processors.kernels.constants import constant_per_shape

MASK_MULTIPLE = 16  # 310P: a mask is only taken with lengths that are multiples of this
ALL_TOKENS = 2**31 - 1
HIGH_PRECISION = 10  # `sparse_mode` of the prompt operator: mode 0 with softmax in float32 (inner_precise 0)
EXACT, EXACT_WITH_EMPTY_ROWS = 0, 2  # `inner_precise` of the other two


def prompt_flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    attention_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """`npu_prompt_flash_attention`, the one fused attention of 310P. Arguments as `processors.attention`.

    A masked call is padded to lengths the operator takes, with keys that are masked out and queries that are cut off.
    """
    length = query.shape[1]
    padding = -length % MASK_MULTIPLE if is_causal or attention_mask is not None else 0
    query, key, value = (_pad_tokens(tensor, padding) for tensor in (query, key, value))
    hidden = None
    if is_causal:
        hidden = causal_mask(length + padding, length + padding, query.device)
    elif attention_mask is not None:
        hidden = _hide_padding(_hidden(attention_mask, length, length), padding)
    output = torch.ops.npu.npu_prompt_flash_attention(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        atten_mask=hidden,
        num_heads=heads,
        scale_value=_scale(query, heads, scale),
        next_tokens=ALL_TOKENS,  # the default, 0, skips the blocks above the diagonal of any mask
        input_layout="BSH",
        sparse_mode=HIGH_PRECISION,
    )[:, :length]
    if attention_mask is None:
        return output
    # The operator subtracts 10000 where it masks, so a row without any key is an average; torch has zeros there.
    empty_rows = ~attention_mask.any(-1).squeeze(1)
    return output.masked_fill(empty_rows.unsqueeze(-1), 0.0)


def fused_infer_attention_score(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    attention_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """`npu_fused_infer_attention_score` of A2 and A3 chips. Arguments as `processors.attention`."""
    hidden = _hidden_keys(query, key, attention_mask, is_causal)
    return torch.ops.npu.npu_fused_infer_attention_score(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        atten_mask=hidden,
        num_heads=heads,
        scale=_scale(query, heads, scale),
        input_layout="BSH",
        inner_precise=EXACT if attention_mask is None else EXACT_WITH_EMPTY_ROWS,
    )[0]


def fusion_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    attention_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """`npu_fusion_attention` of A2 and A3, which has a derivative. Arguments as `processors.attention`."""
    hidden = _hidden_keys(query, key, attention_mask, is_causal)
    if hidden is not None and hidden.dim() == 4 and hidden.shape[1] > 1:
        # A mask for each head has one for each sample as well.
        hidden = hidden.expand(len(query), -1, -1, -1).contiguous()
    return torch.ops.npu.npu_fusion_attention(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        heads,
        "BSH",
        atten_mask=hidden,
        scale=_scale(query, heads, scale),
        inner_precise=EXACT if attention_mask is None else EXACT_WITH_EMPTY_ROWS,
    )[0]


@constant_per_shape
def causal_mask(query_length: int, key_length: int, device: torch.device) -> torch.Tensor:
    """[query_length, key_length], True above the diagonal: what the operators leave out of causal attention."""
    return torch.ones(query_length, key_length, dtype=torch.bool).triu(1).to(device)


def _scale(query: torch.Tensor, heads: int, scale: float | None) -> float:
    return (query.shape[-1] // heads) ** -0.5 if scale is None else scale


def _pad_tokens(tensor: torch.Tensor, padding: int) -> torch.Tensor:
    # By concatenation: the graph compiler has no converter for constant_pad_nd.
    batch, _, channels = tensor.shape
    return torch.cat([tensor, tensor.new_zeros(batch, padding, channels)], dim=1) if padding else tensor


def _hidden_keys(
    query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None, is_causal: bool
) -> torch.Tensor | None:
    """What the operators of A2 and A3 leave out: [query_length, key_length] of causal attention, else as `_hidden`."""
    if is_causal:
        return causal_mask(query.shape[1], key.shape[1], query.device)
    return None if attention_mask is None else _hidden(attention_mask, query.shape[1], key.shape[1])


def _hidden(attention_mask: torch.Tensor, query_length: int, key_length: int) -> torch.Tensor:
    """The operators' mask, [batch or 1, heads or 1, query_length, key_length], of one in torch's sense."""
    return (~attention_mask).expand(-1, -1, query_length, key_length).contiguous()


def _hide_padding(hidden: torch.Tensor, padding: int) -> torch.Tensor:
    if not padding:
        return hidden
    batch, _, length, _ = hidden.shape
    hidden = torch.cat([hidden, hidden.new_ones(batch, 1, length, padding)], dim=-1)
    return torch.cat([hidden, hidden.new_ones(batch, 1, padding, length + padding)], dim=-2)
