"""A module as an ONNX file that computes what the module does."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runners.cli import UserError

OPSETS = (18, 17)  # CANN reads up to 18, and LayerNormalization from 17 on; torch writes 18, and converts to 17
BATCH = "batch"
TOLERANCE = 1e-3  # of the largest number of a result, in float32
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def require_packages() -> None:
    """Raise UserError unless all that exports and checks is installed."""
    for name in PACKAGES:
        try:
            __import__(name)
        except ImportError as error:
            raise UserError(
                f"{name} is missing, which exports need: pip install -r requirements-onnx.txt ({error})"
            ) from error


def export_onnx(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    path: Path,
    opset: int = OPSETS[0],
    dynamic_batch: bool = False,
) -> None:
    """Write `module`, called with `inputs` in their order, to `path`, weights and all.

    Args:
        module: on the CPU in float32, without fused attention: its guard of rows without any key becomes operators
            that some chips lack.
        dynamic_batch: leave the first dimension of all inputs open, and not as in `inputs`.
    """
    import onnx

    batch = torch.export.Dim(BATCH, min=1, max=2**15)
    shapes = tuple({0: batch} for _ in inputs) if dynamic_batch else None
    with warnings.catch_warnings(), _quiet("torch.onnx"):
        warnings.simplefilter("ignore", FutureWarning)  # torch's, of its own code
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=opset,
            dynamo=True,
            external_data=False,
            dynamic_shapes=shapes,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    _split_partial_shapes(model)
    onnx.save(model, path)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Drop what a logger says below errors: torchvision's operators are not there, and nothing needs them."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _split_partial_shapes(model: Any) -> None:
    """Let `Shape` give the whole shape, and `Slice` the part of it: CANN's parser overlooks start and end of Shape."""
    from onnx import helper

    nodes = []
    for node in model.graph.node:
        limits = {attribute.name: attribute.i for attribute in node.attribute} if node.op_type == "Shape" else {}
        if not limits:
            nodes.append(node)
            continue
        (shape,) = node.output
        bounds = {"starts": limits.get("start", 0), "ends": limits.get("end", 2**31 - 1)}
        for name, value in bounds.items():
            model.graph.initializer.append(helper.make_tensor(f"{shape}_{name}", 7, [1], [value]))  # 7: int64
        nodes.append(helper.make_node("Shape", node.input, [f"{shape}_whole"], name=f"{node.name}_whole"))
        sliced = [f"{shape}_whole", *(f"{shape}_{name}" for name in bounds)]
        nodes.append(helper.make_node("Slice", sliced, [shape], name=f"{node.name}_slice"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def check_onnx(path: Path, module: nn.Module, examples: Sequence[Mapping[str, Tensor]]) -> float:
    """The largest difference between the file in onnxruntime and `module`, as a share of the largest number.

    Raises:
        UserError: the file is not valid, or differs by more than TOLERANCE.
    """
    import onnx
    import onnxruntime

    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for inputs in examples:
        with torch.no_grad():
            expected = module(*inputs.values())
        (result,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        difference = (torch.from_numpy(result) - expected).abs().max() / expected.abs().max()
        worst = max(worst, difference.item())
    if not worst <= TOLERANCE:
        raise UserError(f"{path.name} differs from the model by {worst:.2g} of its largest number: it is not used")
    return worst
