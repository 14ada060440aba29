"""Our attention for models that attend through diffusers' dispatcher: Flux, Stable Diffusion 3 and other transformers.

Their processors hold a backend, by name or, in the fork, a function. `use_kernels` puts ours there.
"""

import functools
from typing import Any

import torch

from processors.kernels.attention import attention


def dispatched_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernels: tuple[str, ...] | None = None,
    _parallel_config: Any = None,
) -> torch.Tensor:
    """A backend of `dispatch_attention_fn`, `[batch, tokens, heads, head_dim]` to the same.

    Args:
        attn_mask: as `processors.attention` takes it, or `[batch, keys]`.
        enable_gqa: several heads of `query` share one of `key` and `value`.
        kernels: what `check_kernels` made of the user's choice.

    Raises:
        ValueError: dropout, statistics of the softmax or context parallelism, which the kernels do not offer.
    """
    wanted = {"dropout_p": dropout_p, "return_lse": return_lse, "context parallelism": _parallel_config}
    asked = [name for name, value in wanted.items() if value]
    if asked:
        raise ValueError(
            f"the kernels of enable_fused_kernels do not offer {' and '.join(asked)}: call disable_fused_kernels first"
        )
    if attn_mask is not None and attn_mask.shape == (len(query), key.shape[1]):
        attn_mask = attn_mask[:, None, None, :]  # of the keys, as the default backend reads it
    heads = query.shape[2]
    if enable_gqa:
        key, value = (tensor.repeat_interleave(heads // tensor.shape[2], dim=2) for tensor in (key, value))
    query, key, value = (tensor.flatten(2) for tensor in (query, key, value))
    return attention(query, key, value, heads, attn_mask, is_causal, scale, kernels).unflatten(2, (heads, -1))


def dispatches(processor: Any) -> bool:
    """Whether `processor` attends through the dispatcher, by its default backend or by ours."""
    backend = getattr(processor, "_attention_backend", "none")
    return backend is None or is_ours(processor)


def is_ours(processor: Any) -> bool:
    backend = getattr(processor, "_attention_backend", None)
    return isinstance(backend, functools.partial) and backend.func is dispatched_attention


def use_kernels(processor: Any, kernels: tuple[str, ...] | None) -> None:
    """Let a processor that `dispatches` attend by our kernels: by these, or all of them."""
    processor._attention_backend = functools.partial(dispatched_attention, kernels=kernels)


def use_default(processor: Any) -> None:
    """Undo `use_kernels`; does nothing where another backend was chosen since."""
    if is_ours(processor):
        del processor._attention_backend  # the class's is None
