"""The models of a pipeline."""

from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline


def components_of(pipe: Any) -> dict[str, torch.nn.Module]:
    """The models of a pipeline by their names in it, each once, or a model by the name of its class.

    Raises:
        TypeError: neither a pipeline nor a model.
    """
    if isinstance(pipe, torch.nn.Module):
        model = getattr(pipe, "_orig_mod", pipe)  # what torch.compile wrapped
        return {type(model).__name__: model}
    if isinstance(pipe, DiffusionPipeline):
        parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
        first = {id(part): name for name, part in reversed(parts.items())}
        return {name: part for name, part in parts.items() if first[id(part)] == name}
    raise TypeError(f"expected a pipeline of diffusers or a model, got {type(pipe).__name__}")
