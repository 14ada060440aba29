"""HiDream's mixtures of experts, with the experts' weights in two tensors and without waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU, MoEGate
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from processors.kernels import npu_experts
from processors.kernels.experts import expert_feed_forward
from processors.kernels.low_rank_experts import Factor, LowRank

LAYERS = ("w1", "w2", "w3")


class PartOfStack(torch.Tensor):
    """A weight that is a part of a larger tensor: what is assigned to its `data`, as peft does, is written there."""

    @property
    def data(self) -> torch.Tensor:
        return super().data

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if value.data_ptr() != self.data_ptr():  # else it was changed in place
            with torch.no_grad():
                self.copy_(value)


class StackedLinear(nn.Linear):
    """A layer of an expert whose weight is in its mixture's stack; adapters go on top of it.

    A layer becomes one by `stack` and an ordinary one by `unstack`, with hooks and all. The mixture computes from the
    stack and never calls it. In a state dict it has its own name.
    """

    _parameters_of_stack: dict[str, Any]

    def stack(self, parameters: dict[str, Any], name: str, expert: int, first: int) -> None:
        """Let the weight be the rows from `first` on of the expert in the parameter `name` of the stack."""
        del self._parameters["weight"]
        self._parameters_of_stack, self.stacked_in = parameters, (name, expert, first)

    def part(self) -> torch.Tensor:
        """The weight, in the stack."""
        name, expert, first = self.stacked_in
        return self._parameters_of_stack[name][expert].narrow(0, first, self.out_features)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        return self.part().detach().as_subclass(PartOfStack)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.part())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.part() if keep_vars else self.part().detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, torch.Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key, part = f"{prefix}weight", self.part()
        given = state_dict.get(key)
        if given is None:
            missing_keys.append(key)
        elif given.shape != part.shape:
            error_msgs.append(f"size mismatch for {key}: {tuple(given.shape)} for {tuple(part.shape)}")
        else:
            with torch.no_grad():
                part.copy_(given)


class StackedExperts(nn.Module):
    """The experts, and their weights in two tensors. In a state dict they are as they were.

    Attributes:
        gate_up: `[experts, 2 * hidden, dim]`, each expert's `w1` above its `w3`.
        down: `[experts, dim, hidden]`, each expert's `w2`.
    """

    def __init__(self, experts: nn.ModuleList) -> None:
        super().__init__()
        layers: list[dict[str, Any]] = [{name: layer_of(expert, name) for name in LAYERS} for expert in experts]
        wants_grad = layers[0]["w1"].weight.requires_grad
        hidden = layers[0]["w1"].out_features
        # With the host: beside the weights that there are, a device might have no room for them.
        gate_up = torch.stack([torch.cat([_on_host(of["w1"].weight), _on_host(of["w3"].weight)]) for of in layers])
        down = torch.stack([_on_host(of["w2"].weight) for of in layers])
        self.gate_up = nn.Parameter(gate_up.detach(), wants_grad)
        self.down = nn.Parameter(down.detach(), wants_grad)
        for number, (expert, of) in enumerate(zip(experts, layers, strict=True)):
            self.add_module(str(number), expert)
            for name, place in (("w1", ("gate_up", number, 0)), ("w2", ("down", number, 0))):
                _stack(of[name], self._parameters, *place)
            _stack(of["w3"], self._parameters, "gate_up", number, hidden)

    def unstacked(self) -> nn.ModuleList:
        """The modules again."""
        for expert in self.children():
            for name in LAYERS:
                _unstack(layer_of(expert, name), self.down.requires_grad)
        return nn.ModuleList(self.children())

    def low_rank(self) -> LowRank:
        """The adapters that are in effect, empty where none is."""
        hidden = self.down.shape[2]
        gate_up = [
            Factor(number, a, F.pad(b, (0, 0, hidden, 0) if name == "w3" else (0, 0, 0, hidden)))
            for name in ("w1", "w3")
            for number, a, b in self._factors(name)
        ]
        return LowRank(gate_up, list(self._factors("w2")))

    def _factors(self, name: str) -> Iterator[Factor]:
        for number, expert in enumerate(self.children()):
            layer = getattr(expert, name)
            if not isinstance(layer, LoraLinear):
                continue
            if layer.disable_adapters and layer.merged:  # peft's layer does so when it is called
                layer.unmerge()
            if not (layer.disable_adapters or layer.merged):
                yield from (_factor(number, layer, name) for name in layer.active_adapters if name in layer.lora_A)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing: the experts do."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, torch.Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if strict:
            mine = (key for key in state_dict if key.startswith(prefix))
            unexpected_keys += [key for key in mine if key[len(prefix) :].partition(".")[0] not in self._modules]


class FusedMoE(MOEFeedForwardSwiGLU):
    """`MOEFeedForwardSwiGLU` that computes its experts by `processors.kernels.experts`, also where it trains.

    A module becomes one by `fuse` and an ordinary one again by `unfuse`. LoRA adapters of peft on its experts are
    loaded, switched and merged as on ordinary layers, before or after, and computed beside the stack.
    """

    experts: StackedExperts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.view(-1, x.shape[-1])
        indices, weights = self._choose(x)
        experts = self.experts
        y = expert_feed_forward(tokens, indices, weights, experts.gate_up, experts.down, experts.low_rank())
        return y.view_as(x) + self.shared_experts(x)

    def _choose(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts of each token, `[tokens, choices]`, and their shares."""
        gate = self.gate
        if type(gate) is MoEGate and npu_experts.can_choose(x.device):
            return npu_experts.choose(F.linear(x.view(-1, x.shape[-1]), gate.weight), gate.top_k)
        indices, weights, _ = gate(x)
        return indices, weights


def is_fusable(moe: MOEFeedForwardSwiGLU) -> bool:
    """Whether the experts are plain layers, or such with LoRA adapters, whose weights stay where and as they are."""
    if type(moe) is FusedMoE:
        return True
    layers = [getattr(expert, name) for expert in moe.experts for name in LAYERS]
    bases = [layer.base_layer if type(layer) is LoraLinear else layer for layer in layers]
    return type(moe) is MOEFeedForwardSwiGLU and all(map(_is_plain, bases))


def fuse(moe: MOEFeedForwardSwiGLU) -> None:
    """Turn a mixture that `is_fusable` into a fused one; others stay as they are."""
    if type(moe) is MOEFeedForwardSwiGLU and is_fusable(moe):
        device = moe.gate.weight.device
        moe.experts = StackedExperts(moe.experts).train(moe.training)
        moe.experts.to(device)
        moe.__class__ = FusedMoE


def unfuse(moe: MOEFeedForwardSwiGLU) -> None:
    """Undo `fuse`."""
    if isinstance(moe, FusedMoE):
        experts: Any = (moe.experts if moe.experts.down.is_meta else moe.experts.cpu()).unstacked()
        moe.__class__ = MOEFeedForwardSwiGLU
        moe.experts = experts.train(moe.training).to(moe.gate.weight.device)


def layer_of(expert: Any, name: str) -> Any:
    """The layer itself, below adapters on it."""
    layer = getattr(expert, name)
    return layer.base_layer if isinstance(layer, LoraLinear) else layer


def _is_plain(layer: Any) -> bool:
    return type(layer) is nn.Linear and not hasattr(layer, "_diffusers_hook")  # of layerwise casting, or offloading


def _on_host(weight: torch.Tensor) -> torch.Tensor:
    return weight if weight.is_meta else weight.cpu()


def _stack(layer: Any, parameters: dict[str, Any], name: str, expert: int, first: int) -> None:
    layer.__class__ = StackedLinear
    layer.stack(parameters, name, expert, first)


def _unstack(layer: Any, wants_grad: bool) -> None:
    weight = layer.part().detach().clone()
    del layer._parameters_of_stack, layer.stacked_in
    layer.__class__ = nn.Linear
    layer.weight = nn.Parameter(weight, wants_grad)


def _factor(expert: int, layer: Any, adapter: str) -> Factor:
    """Raises ValueError: the adapter is more than a product of two matrices."""
    dropout = layer.training and not isinstance(layer.lora_dropout[adapter], nn.Identity)
    if adapter in layer.lora_variant or layer.lora_bias[adapter] or dropout:
        raise ValueError(
            f"adapter '{adapter}' has a bias, dropout in training, or is of another kind than plain LoRA, such as "
            "DoRA, and stacked experts compute none of these: call disable_fused_kernels(model)"
        )
    scale, b = layer.scaling[adapter], layer.lora_B[adapter].weight
    return Factor(expert, layer.lora_A[adapter].weight, b if scale == 1 else b * scale)
