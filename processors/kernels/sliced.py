"""Attention in plain math that holds only a bounded slice of the scores."""

import torch

from processors.kernels.call import AttentionInputs

# Scores of one slice, in bytes. Softmax holds two such tensors and the copy in the model's dtype at a time.
SCORE_BYTES = 128 * 2**20


def sliced_attention(inputs: AttentionInputs, score_bytes: int = SCORE_BYTES) -> torch.Tensor:
    """Same result as `F.scaled_dot_product_attention`, a slice of the queries at a time.

    Scores and softmax are float32 or better, whatever the dtype of `query`. A slice of scores takes at most
    `score_bytes`, or one query's scores if these are more.
    """
    query, key, value = inputs.split_heads()
    scale = inputs.factor()
    batch, heads, query_length, _ = query.shape
    scores_dtype = torch.promote_types(query.dtype, torch.float32)
    key = key.to(scores_dtype).transpose(-1, -2)
    rows = max(1, score_bytes // max(1, batch * heads * key.shape[-1] * scores_dtype.itemsize))

    outputs = []
    for start in range(0, query_length, rows):
        stop = min(start + rows, query_length)
        scores = (query[:, :, start:stop].to(scores_dtype) * scale) @ key
        mask = _mask_of_rows(inputs, start, stop)
        outputs.append(_softmax(scores, mask).to(value.dtype) @ value)
    return torch.cat(outputs, dim=2).transpose(1, 2).flatten(2)


def _mask_of_rows(inputs: AttentionInputs, start: int, stop: int) -> torch.Tensor | None:
    mask, device = inputs.attention_mask, inputs.query.device
    if inputs.is_causal:
        return torch.arange(start, stop, device=device)[:, None] >= torch.arange(inputs.key.shape[1], device=device)
    return mask if mask is None or mask.shape[-2] == 1 else mask[..., start:stop, :]


def _softmax(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the keys that `mask` keeps; a row without any is all zeros, as in torch's own attention."""
    if mask is None:
        return scores.softmax(-1)
    if mask.dtype == torch.bool:
        kept = mask
        # Finite, since an infinity becomes 65504 where a chip saturates and NaN in the softmax of an empty row.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        kept = mask != -torch.inf
        scores = scores + mask
    return scores.softmax(-1).masked_fill(~kept.any(-1, keepdim=True), 0.0)
