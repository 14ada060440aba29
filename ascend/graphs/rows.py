"""What is equal for all rows of a batch is computed for one of them.

A pipeline's timestep is one number, which a UNet repeats for each picture of the batch: all that follows from it until
it meets the pictures has equal rows. That they are equal is read from the graph alone, which repeats them; a timestep
for each picture is an argument with rows of its own.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ascend.graphs.nodes import add_call, args_of, shape_of, value_of

aten = torch.ops.aten


def compute_equal_rows_once(graph: fx.Graph) -> None:
    """Let what repeats one row stand behind what computes with the rows, and go where the rest broadcasts them."""
    single: dict[fx.Node, fx.Node] = {}  # of a node with equal rows: what computes one
    for node in list(graph.nodes):
        if _repeats_a_row(node):
            single[node] = args_of(node)[0]
        elif _keeps_rows(node, single):
            with graph.inserting_after(node):
                single[node] = add_call(graph, node.target, *_replaced(args_of(node), single), **node.kwargs)
        else:
            _read_rows(graph, node, single)


def _read_rows(graph: fx.Graph, node: fx.Node, single: dict[fx.Node, fx.Node]) -> None:
    """Let a node that needs all rows have them."""
    for source in node.all_input_nodes:
        if source not in single or _repeats_a_row(source):
            continue
        row = single[source]
        if not _broadcasts(node, source):
            with graph.inserting_before(node):
                row = add_call(graph, aten.expand.default, row, list(shape_of(source)))
        node.replace_input_with(source, row)


def _repeats_a_row(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target != aten.expand.default:
        return False
    before, after = shape_of(node.args[0]), shape_of(node)
    return len(before) == len(after) > 0 and before[0] == 1 < after[0] and before[1:] == after[1:]


def _keeps_rows(node: fx.Node, single: dict[fx.Node, fx.Node]) -> bool:
    """Whether each row of the result depends on the same row of operands that all have equal rows."""
    if node.op != "call_function" or single.keys().isdisjoint(node.all_input_nodes):
        return False
    if _is_pointwise(node):
        rank = len(shape_of(node))
        return all(
            len(shape_of(source)) == rank if source in single else _has_no_rows(source, rank)
            for source in node.all_input_nodes
        )
    first = args_of(node)[0]
    if node.target == operator.getitem:  # of what a split gives
        return first in single
    if node.target == aten.cat.default:
        return all(source in single for source in first) and _is_inner(node, first[0], 0)
    if node.target in (aten.addmm.default, aten.mm.default):
        *bias, rows, matrix = args_of(node)
        return rows in single and matrix not in single and all(_has_no_rows(vector, 2) for vector in bias)
    if node.target in (aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default):
        return _is_inner(node, first, 0)
    return node.target == aten.unsqueeze.default and _is_inner(node, node, None)


def _is_pointwise(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return False
    is_random = torch.Tag.nondeterministic_seeded in node.target.tags
    return node.target == aten._to_copy.default or (torch.Tag.pointwise in node.target.tags and not is_random)


def _is_inner(node: fx.Node, of: fx.Node, otherwise: int | None) -> bool:
    """Whether the dimension that an operator names is not that of the rows, in a tensor like that of node `of`."""
    name = "dim"
    position = [argument.name for argument in node.target._schema.arguments].index(name)  # type: ignore[union-attr]
    dim: Any = node.args[position] if len(node.args) > position else node.kwargs.get(name, otherwise)
    return dim % len(shape_of(of)) != 0


def _has_no_rows(node: Any, rank: int) -> bool:
    shape = shape_of(node)
    return len(shape) < rank or shape[0] == 1


def _broadcasts(node: fx.Node, source: fx.Node) -> bool:
    """Whether `node` computes the same from one row of `source`, as another operand has all of them."""
    shape = shape_of(node)
    return (
        node.op == "call_function"
        and _is_pointwise(node)
        and len(shape_of(source)) == len(shape) > 0
        and any(
            other is not source and len(shape_of(other)) == len(shape) and shape_of(other)[0] == shape[0]
            for other in node.all_input_nodes
            if isinstance(value_of(other), torch.Tensor)
        )
    )


def _replaced(arguments: Any, single: dict[fx.Node, fx.Node]) -> Any:
    return fx.node.map_arg(arguments, lambda node: single.get(node, node))
