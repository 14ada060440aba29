"""Reading and writing the nodes of FX graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def args_of(node: fx.Node) -> Any:
    """The arguments by position, of whatever types the operator takes."""
    return node.args


def value_of(node: Any) -> Any:
    """The fake tensor, or tuple of them, that stands for what `node` computes; None of what is no node."""
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def shape_of(node: Any) -> tuple[int, ...]:
    """Of the tensor that `node` computes; of anything else that of a number."""
    value = value_of(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def add_call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call of `target` where `graph` inserts, with what it computes."""
    node = graph.call_function(target, args, kwargs)
    values, named = fx.node.map_arg((args, kwargs), value_of)
    node.meta["val"] = target(*values, **named)
    return node
