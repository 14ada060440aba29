"""Whole weights that come with an adapter and are switched with it, such as the norms and gates in E1-Full's file."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.func import functional_call


class FullWeights(nn.Module, BaseTunerLayer):
    """A layer that computes with an adapter's weights in the place of its own while the adapter is in effect.

    peft and diffusers switch, scale, merge and remove it as they do their own layers. The layer's own weights stay in
    `base_layer`, untouched. A scale of s computes with `own + s * (adapter's - own)`, for several adapters their sum,
    and 1, of one alone, with the adapter's to the bit.

    Attributes:
        lora_full: by adapter, its tensors by their names in the layer.
    """

    adapter_layer_names = ("lora_full",)
    other_param_names = ("scaling", "r")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_full = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.r: dict[str, int] = {}  # diffusers counts adapters by it
        self.merged_adapters: list[str] = []
        self.own: dict[str, torch.Tensor] = {}  # while adapters are merged

    @property  # by which diffusers tells layers with adapters
    def lora_A(self) -> nn.ModuleDict:
        return self.lora_full

    lora_B = lora_A

    def add(self, adapter: str, weights: dict[str, torch.Tensor]) -> None:
        """Have `weights`, by their names in the layer, in effect with `adapter`."""
        own = dict(self.base_layer.named_parameters(recurse=False))
        cast = {name: tensor.to(own[name].device, own[name].dtype) for name, tensor in weights.items()}
        self.lora_full[adapter] = nn.ParameterDict({name: nn.Parameter(value, False) for name, value in cast.items()})
        self.scaling[adapter], self.r[adapter] = 1.0, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters and self.merged:  # as peft's layers
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(*args, **kwargs)
        weights = self.weights_of([name for name in self.active_adapters if name in self.lora_full])
        return functional_call(self.base_layer, weights, args, kwargs) if weights else self.base_layer(*args, **kwargs)

    def weights_of(self, adapters: list[str]) -> dict[str, torch.Tensor]:
        """The layer's tensors that `adapters` change, as they are with all of them."""
        full: Any = self.lora_full
        tensors = [(self.scaling[adapter], dict(full[adapter].items())) for adapter in adapters]
        if len(tensors) == 1 and tensors[0][0] == 1:
            return tensors[0][1]
        result: dict[str, torch.Tensor] = {}
        for scale, theirs in tensors:
            for name, tensor in theirs.items():
                own = self.own.get(name, getattr(self.base_layer, name))
                result[name] = result.get(name, own) + scale * (tensor - own)
        return result

    def set_scale(self, adapter: str, scale: float) -> None:
        if adapter in self.scaling:
            self.scaling[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] = 1.0 if scale is None else self.scaling[adapter] / scale

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Compute with the adapters' weights until `unmerge`, which brings the layer's own back to the bit."""
        adapters = check_adapters_to_merge(self, adapter_names)
        present = [name for name in adapters if name in self.lora_full]
        for name, tensor in self.weights_of(self.merged_adapters + present).items():
            own = getattr(self.base_layer, name)
            self.own.setdefault(name, own.detach().clone())
            own.copy_(tensor)
        self.merged_adapters += present

    @torch.no_grad()
    def unmerge(self) -> None:
        for name, tensor in self.own.items():
            getattr(self.base_layer, name).copy_(tensor)
        self.own.clear()
        self.merged_adapters.clear()
