"""What the switches of presets ask of a target."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from ascend.streaming.blocks import tensors_of
from processors.models.components import components_of

Target: TypeAlias = DiffusionPipeline | nn.Module
Undo = Callable[[], None]
Done = tuple[str, Undo | None]
ON_BEFORE = "on before"


class Unsupported(Exception):
    """The target, or the device, cannot have a switch; the message says why."""


@contextmanager
def undone_if_it_fails(undo: Undo) -> Iterator[None]:
    """Calls `undo` if the block ends by an error or an interrupt."""
    try:
        yield
    except BaseException:
        undo()
        raise


def words_of(report: dict[str, str]) -> str:
    return "; ".join(f"{name}: {words}" for name, words in report.items())


def trains(target: Target) -> str | None:
    """Which model of `target` is in training mode and wants gradients."""
    for name, model in components_of(target).items():
        if model.training and any(parameter.requires_grad for parameter in model.parameters()):
            return name
    return None


def require_inference(target: Target) -> None:
    name = trains(target)
    if name is not None:
        raise Unsupported(f"{name} is in training mode and wants gradients; eval() ends that")


def require_at_rest(target: Target) -> None:
    for name, model in components_of(target).items():
        if any(hasattr(module, "_hf_hook") for module in model.modules()):
            raise Unsupported(f"hooks move the weights of {name} already")
        if any(tensor.is_meta for tensor in tensors_of(model)):
            raise Unsupported(f"{name} has no weights, it is on the meta device")


def find_model(target: Target, attribute: str) -> Any:
    """The first model of `target` that has `attribute`, or None."""
    return next((model for model in components_of(target).values() if hasattr(model, attribute)), None)
