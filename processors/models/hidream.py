"""HiDream's mixtures of experts, with the experts' weights in two tensors and without waits for the device."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_hidream_image import HiDreamImageFeedForwardSwiGLU, MOEFeedForwardSwiGLU
from torch import nn

from processors.kernels.experts import expert_feed_forward


class StackedExperts(nn.Module):
    """The experts' weights. In a state dict they have the names of the modules that they stand for.

    Attributes:
        gate_up: `[experts, 2 * hidden, dim]`, each expert's `w1` above its `w3`.
        down: `[experts, dim, hidden]`, each expert's `w2`.
    """

    def __init__(self, experts: nn.ModuleList) -> None:
        super().__init__()
        layers: list[Any] = list(experts)
        wants_grad = layers[0].w1.weight.requires_grad
        # With the host: beside the weights that there are, a device might have no room for them.
        gate_up = torch.stack([torch.cat([expert.w1.weight.cpu(), expert.w3.weight.cpu()]) for expert in layers])
        down = torch.stack([expert.w2.weight.cpu() for expert in layers])
        self.gate_up = nn.Parameter(gate_up.detach(), wants_grad)
        self.down = nn.Parameter(down.detach(), wants_grad)

    def unstacked(self) -> nn.ModuleList:
        """The modules again."""
        experts: list[Any] = []
        for tensors in self._by_expert():
            with torch.device("meta"):
                expert: Any = HiDreamImageFeedForwardSwiGLU(self.down.shape[1], self.down.shape[2])
            for name, tensor in tensors.items():
                layer = getattr(expert, name)
                layer.weight = nn.Parameter(tensor.detach().clone(), self.down.requires_grad)
                layer.out_features, layer.in_features = tensor.shape  # HiDream rounds the hidden size up
            experts.append(expert.train(self.training))
        return nn.ModuleList(experts)

    def _by_expert(self) -> list[dict[str, torch.Tensor]]:
        hidden = self.down.shape[2]
        return [
            {"w1": gate_up[:hidden], "w2": down, "w3": gate_up[hidden:]}
            for gate_up, down in zip(self.gate_up, self.down, strict=True)
        ]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for number, tensors in enumerate(self._by_expert()):
            for name, tensor in tensors.items():
                # Files hold no views of one tensor.
                destination[f"{prefix}{number}.{name}.weight"] = tensor if keep_vars else tensor.detach().clone()

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
        for number, tensors in enumerate(self._by_expert()):
            for name, tensor in tensors.items():
                key = f"{prefix}{number}.{name}.weight"
                given = state_dict.get(key)
                if given is None:
                    missing_keys.append(key)
                elif given.shape != tensor.shape:
                    error_msgs.append(f"size mismatch for {key}: {tuple(given.shape)} for {tuple(tensor.shape)}")
                else:
                    with torch.no_grad():
                        tensor.copy_(given)
        if strict:
            known = {f"{number}.{name}.weight" for number in range(len(self.down)) for name in ("w1", "w2", "w3")}
            unexpected_keys += [
                key for key in state_dict if key.startswith(prefix) and key[len(prefix) :] not in known
            ]


class FusedMoE(MOEFeedForwardSwiGLU):
    """`MOEFeedForwardSwiGLU` that computes its experts by `processors.kernels.experts`, also where it trains.

    A module becomes one by `fuse` and an ordinary one again by `unfuse`.
    """

    experts: StackedExperts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        indices, weights, _ = self.gate(x)
        tokens = x.view(-1, x.shape[-1])
        y = expert_feed_forward(tokens, indices, weights, self.experts.gate_up, self.experts.down)
        return y.view_as(x) + self.shared_experts(x)


def is_fusable(moe: MOEFeedForwardSwiGLU) -> bool:
    """Whether the experts are plain layers whose weights stay where they are: no adapters, no offloading."""
    if type(moe) is FusedMoE:
        return True
    layers = [layer for expert in moe.experts for layer in (expert.w1, expert.w2, expert.w3)]
    return type(moe) is MOEFeedForwardSwiGLU and all(type(layer) is nn.Linear for layer in layers)


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
        experts: Any = moe.experts.cpu().unstacked()
        moe.__class__ = MOEFeedForwardSwiGLU
        moe.experts = experts.to(moe.gate.weight.device)
