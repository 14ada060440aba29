"""Fewer launches and conversions of formats for the same results, with what GE's operators take.

Convolutions read and write feature maps in the chip's own format, NC1HWC0, as what goes element by element between
them does; norms and matrix products want plain ones, and GE converts in between.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from ascend.chips import ADD_LAYER_NORM, has_operator
from ascend.graphs.nodes import add_call, args_of, shape_of, value_of

aten = torch.ops.aten

LEAST_NORMED = 32  # bytes of the last dimension (ops-nn, norm/add_layer_norm/docs/aclnnAddLayerNorm.md)


def fuse(graph: fx.Graph) -> None:
    """All of this module; what is no longer used stays in `graph`."""
    for addition in _calls(graph, aten.add.Tensor):
        if _is_sum(addition):
            _add_by_convolution(graph, addition) or _add_by_product(graph, addition)
    _add_plain_maps(graph)
    for norm in _calls(graph, aten.native_layer_norm.default):
        _add_by_norm(graph, norm)


def _add_by_convolution(graph: fx.Graph, addition: fx.Node) -> bool:
    """A number for each channel is added to a convolution as its bias, which may be computed: no pass over the map,
    and no conversion of the numbers."""
    for convolved, numbers in _in_both_orders(addition):
        if not _is_only_read_by(convolved, aten.convolution.default, addition):
            continue
        x, weight, bias, *settings, is_transposed, padding, groups = args_of(convolved)
        rank = len(shape_of(addition))
        channels = shape_of(addition)[1]
        if is_transposed or shape_of(numbers) != (1, channels, *[1] * (rank - 2)):
            continue
        with graph.inserting_before(addition):
            vector = add_call(graph, aten.view.default, numbers, [channels])
            if bias is not None:
                vector = add_call(graph, aten.add.Tensor, bias, vector)
            arguments = (x, weight, vector, *settings, is_transposed, padding, groups)
            _replace(addition, add_call(graph, convolved.target, *arguments))
        return True
    return False


def _add_by_product(graph: fx.Graph, addition: fx.Node) -> bool:
    """torch adds the bias of a linear layer by itself where rows do not lie behind each other, as those of a map."""
    for product, bias in _in_both_orders(addition):
        if not _is_only_read_by(product, aten.matmul.default, addition) or len(shape_of(bias)) != 1:
            continue
        rows, matrix = args_of(product)
        if len(shape_of(rows)) < 3 or getattr(matrix, "target", None) != aten.t.default:
            continue
        with graph.inserting_before(addition):
            _replace(addition, add_call(graph, aten.linear.default, rows, matrix.args[0], bias))
        return True
    return False


def _add_plain_maps(graph: fx.Graph) -> None:
    """Sums of a convolution's map and a plain one are taken of plain maps.

    GE would convert the plain one, and the sum back for the norm that follows; a map of three dimensions it leaves
    plain.
    """
    blocked: set[Any] = set()
    for node in list(graph.nodes):
        if node.op != "call_function" or len(shape_of(node)) != 4:
            continue
        maps = [source for source in node.all_input_nodes if shape_of(source) == shape_of(node)]
        are_blocked = [source in blocked for source in maps]
        if node.target == aten.convolution.default or (_is_elementwise(node) and maps and all(are_blocked)):
            blocked.add(node)
        elif node.target == aten.add.Tensor and _is_sum(node) and len(maps) == 2 and any(are_blocked):
            batch, channels, *size = shape_of(node)
            with graph.inserting_before(node):
                flat = [add_call(graph, aten.view.default, part, [batch, channels, math.prod(size)]) for part in maps]
                total = add_call(graph, aten.add.Tensor, *flat)
                _replace(node, add_call(graph, aten.view.default, total, [batch, channels, *size]))


def _add_by_norm(graph: fx.Graph, norm: fx.Node) -> None:
    """The sum of a residual connection and the norm of it by one operator, which gives both."""
    total, sizes, weight, bias, epsilon = args_of(norm)
    is_known = isinstance(total, fx.Node) and total.target == aten.add.Tensor and _is_sum(total)
    if not is_known or shape_of(total.args[0]) != shape_of(total.args[1]) or len(sizes) != 1:
        return
    value = value_of(total)
    are_values_alike = all(
        isinstance(vector, fx.Node) and vector.op == "placeholder" and value_of(vector).dtype == value.dtype
        for vector in (weight, bias)
    )
    is_first_alone = all(user.target == operator.getitem and user.args[1] == 0 for user in norm.users)
    is_large_enough = sizes[0] * value.element_size() >= LEAST_NORMED
    if not (are_values_alike and is_first_alone and is_large_enough and _has_add_layer_norm(value)):
        return
    with graph.inserting_before(total):
        fused = add_call(graph, torch.ops.npu.npu_add_layer_norm.default, *total.args, weight, bias, epsilon, True)
        normed, summed = (add_call(graph, operator.getitem, fused, index) for index in (0, 3))
    for user in list(norm.users):
        _replace(user, normed)
    _replace(total, summed)


def _has_add_layer_norm(value: torch.Tensor) -> bool:
    if value.device.type != "npu" or not value.is_floating_point():
        return False
    return has_operator(torch.get_device_module("npu").get_device_name(value.device), ADD_LAYER_NORM)


def _calls(graph: fx.Graph, target: Any) -> list[fx.Node]:
    return list(graph.find_nodes(op="call_function", target=target))


def _is_sum(addition: fx.Node) -> bool:
    """Whether nothing but two tensors of one dtype are added."""
    values = [value_of(operand) for operand in addition.args]
    are_tensors = all(isinstance(value, torch.Tensor) for value in values)
    return are_tensors and not addition.kwargs and len({value.dtype for value in values}) == 1


def _is_elementwise(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _in_both_orders(addition: fx.Node) -> Iterator[tuple[Any, Any]]:
    first, second = args_of(addition)
    yield first, second
    yield second, first


def _is_only_read_by(node: fx.Node, target: Any, reader: fx.Node) -> bool:
    return node.target == target and list(node.users) == [reader]


def _replace(node: fx.Node, other: fx.Node) -> None:
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)
