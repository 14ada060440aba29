"""The fused attention operators of Ascend chips.

All take [batch, tokens, heads * head_dim], default to scale 1, and read True in a mask as "masked out", the opposite
of torch. Two are made for inference and have no derivative, the third is made for training. They are called as
`torch.ops.npu`, which exists wherever there is an NPU tensor.
"""

import torch

from processors.kernels.call import AttentionInputs
from processors.kernels.constants import constant_per_shape

MASK_MULTIPLE = 16  # 310P: a mask is only taken with lengths that are multiples of this
ALL_TOKENS = 2**31 - 1
HIGH_PRECISION = 10  # `sparse_mode` of the prompt operator: mode 0 with softmax in float32 (inner_precise 0)
EXACT, EXACT_WITH_EMPTY_ROWS = 0, 2  # `inner_precise` of the other two


def prompt_flash_attention(inputs: AttentionInputs) -> torch.Tensor:
    """`npu_prompt_flash_attention`, the one fused attention of 310P.

    A masked call is padded to lengths the operator takes, with keys that are masked out and queries that are cut off.
    """
    query, key, value, heads, attention_mask, is_causal, _ = inputs
    length = query.shape[1]
    padding = -length % MASK_MULTIPLE if is_causal or attention_mask is not None else 0
    query, key, value = (pad_tokens(tensor, padding) for tensor in (query, key, value))
    hidden = None
    if is_causal:
        hidden = causal_mask(length + padding, length + padding, query.device)
    elif attention_mask is not None:
        hidden = hide_padding(hidden_of(attention_mask, length, length), padding)
    output = torch.ops.npu.npu_prompt_flash_attention(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        atten_mask=hidden,
        num_heads=heads,
        scale_value=inputs.factor(),
        next_tokens=ALL_TOKENS,  # the default, 0, skips the blocks above the diagonal of any mask
        input_layout="BSH",
        sparse_mode=HIGH_PRECISION,
    )[:, :length]
    if attention_mask is None:
        return output
    # The operator subtracts 10000 where it masks, so a row without any key is an average; torch has zeros there.
    empty_rows = ~attention_mask.any(-1).squeeze(1)
    return output.masked_fill(empty_rows.unsqueeze(-1), 0.0)


def fused_infer_attention_score(inputs: AttentionInputs) -> torch.Tensor:
    """`npu_fused_infer_attention_score` of A2 and A3 chips."""
    query, key, value, heads, attention_mask, *_ = inputs
    hidden = _hidden_keys(inputs)
    return torch.ops.npu.npu_fused_infer_attention_score(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        atten_mask=hidden,
        num_heads=heads,
        scale=inputs.factor(),
        input_layout="BSH",
        inner_precise=EXACT if attention_mask is None else EXACT_WITH_EMPTY_ROWS,
    )[0]


def fusion_attention(inputs: AttentionInputs) -> torch.Tensor:
    """`npu_fusion_attention` of A2 and A3, which has a derivative."""
    query, key, value, heads, attention_mask, *_ = inputs
    hidden = _hidden_keys(inputs)
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
        scale=inputs.factor(),
        inner_precise=EXACT if attention_mask is None else EXACT_WITH_EMPTY_ROWS,
    )[0]


@constant_per_shape
def causal_mask(query_length: int, key_length: int, device: torch.device) -> torch.Tensor:
    """[query_length, key_length], True above the diagonal: what the operators leave out of causal attention."""
    return torch.ones(query_length, key_length, dtype=torch.bool).triu(1).to(device)


def pad_tokens(tensor: torch.Tensor, padding: int) -> torch.Tensor:
    """`[batch, tokens, channels]` with `padding` more tokens, of zeros."""
    # By concatenation: the graph compiler has no converter for constant_pad_nd.
    batch, _, channels = tensor.shape
    return torch.cat([tensor, tensor.new_zeros(batch, padding, channels)], dim=1) if padding else tensor


def _hidden_keys(inputs: AttentionInputs) -> torch.Tensor | None:
    """What the operators of A2 and A3 leave out: [query_length, key_length] where causal, else as `hidden_of`."""
    query_length, key_length = inputs.query.shape[1], inputs.key.shape[1]
    if inputs.is_causal:
        return causal_mask(query_length, key_length, inputs.query.device)
    return None if inputs.attention_mask is None else hidden_of(inputs.attention_mask, query_length, key_length)


def hidden_of(attention_mask: torch.Tensor, query_length: int, key_length: int) -> torch.Tensor:
    """The operators' mask, [batch or 1, heads or 1, query_length, key_length], of one in torch's sense."""
    return (~attention_mask).expand(-1, -1, query_length, key_length).contiguous()


def hide_padding(hidden: torch.Tensor, padding: int) -> torch.Tensor:
    """The operators' mask `[batch, 1, length, length]` for `padding` more tokens, which nobody sees."""
    if not padding:
        return hidden
    batch, _, length, _ = hidden.shape
    hidden = torch.cat([hidden, hidden.new_ones(batch, 1, length, padding)], dim=-1)
    return torch.cat([hidden, hidden.new_ones(batch, 1, padding, length + padding)], dim=-2)
