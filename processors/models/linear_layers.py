"""The Linear layers of a model, as far as their weights can be quantised: plan and report of `quantize_weights`."""

from collections import Counter
from typing import NamedTuple, Self

import torch

from processors.kernels.quantized import QuantizedLinear
from processors.models.full_weights import FullWeights
from processors.models.hidream import StackedExperts, StackedLinear

FEWEST_WEIGHTS = 4096  # of a layer: fewer save less than 4 KiB, for one more operand in each call
CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


class LinearLayers(NamedTuple):
    """The layers of one model, those that can be quantised, those that are, and all others by what keeps them."""

    plain: dict[str, torch.nn.Linear]
    quantized: list[QuantizedLinear]
    left: Counter[str]

    @classmethod
    def of(cls, model: torch.nn.Module) -> Self:
        """Describe `model` without changing it."""
        linear = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and not isinstance(module, StackedLinear)
        }
        adapters, shared, edges = _adapters(model), _shared_weights(model), _edges(model)
        replaced = {module.base_layer for module in model.modules() if isinstance(module, FullWeights)}
        usual = _usual_dtype(linear)
        plain, quantized = {}, []
        left = Counter(type(module).__name__ for module in model.modules() if isinstance(module, CONVOLUTIONS))
        left.update("mixture with stacked experts" for m in model.modules() if isinstance(m, StackedExperts))
        for name, layer in linear.items():
            part = name.partition(".")[0]
            if isinstance(layer, QuantizedLinear):
                quantized.append(layer)
            elif layer in adapters:
                left["Linear of adapters"] += 1
            elif layer in replaced:
                left["Linear whose weight an adapter replaces"] += 1
            elif type(layer) is not torch.nn.Linear:
                left[type(layer).__name__] += 1
            elif layer.weight.dtype != usual:
                left[f"Linear in {str(layer.weight.dtype).removeprefix('torch.')}"] += 1
            elif id(layer.weight) in shared:
                left["Linear with a shared weight"] += 1
            elif part in edges:
                left[f"Linear outside the blocks ({part})"] += 1
            elif layer.weight.numel() < FEWEST_WEIGHTS:
                left[f"Linear with under {FEWEST_WEIGHTS} weights"] += 1
            else:
                plain[name] = layer
        return cls(plain, quantized, left)

    def words(self) -> str:
        """The report: what is quantised, and after "not covered:" what is not."""
        done, number = [], len(self.quantized)
        if number:
            before = sum(layer.weight.numel() * layer.scale.itemsize for layer in self.quantized)
            after = sum(layer.weight.nbytes + layer.scale.nbytes for layer in self.quantized)
            done = [f"{number} Linear layer{'s' if number > 1 else ''}: {before:,} to {after:,} bytes"]
        left = ", ".join(f"{number} {kind}" for kind, number in sorted(self.left.items()))
        return "; ".join(done + [f"not covered: {left or 'it has no Linear layer'}"] * bool(left or not done))


def _adapters(model: torch.nn.Module) -> set[torch.nn.Module]:
    """What peft has put beside layers, which it keeps as their `base_layer`."""
    beside = (
        child
        for holder in model.modules()
        if hasattr(holder, "base_layer")
        for name, child in holder.named_children()
        if name != "base_layer"
    )
    return {module for child in beside for module in child.modules()}


def _shared_weights(model: torch.nn.Module) -> set[int]:
    """Weights that several modules use: as integers in one of them they would be stored twice."""
    users = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    return {parameter for parameter, number in users.items() if number > 1}


def _usual_dtype(linear: dict[str, torch.nn.Linear]) -> torch.dtype | None:
    """Of most weights, or of what they were before they were quantised; None where there are none."""
    weights = Counter[torch.dtype]()
    for layer in linear.values():
        dtype = layer.scale.dtype if isinstance(layer, QuantizedLinear) else layer.weight.dtype
        if dtype.is_floating_point:
            weights[dtype] += layer.weight.numel()
    return max(weights, key=weights.__getitem__, default=None)


def _edges(model: torch.nn.Module) -> set[str]:
    """The model's own parts that hold no list of blocks, where others do."""
    parts = dict(model.named_children())
    blocks = {name for name, part in parts.items() if any(isinstance(m, torch.nn.ModuleList) for m in part.modules())}
    return parts.keys() - blocks if blocks else set()
