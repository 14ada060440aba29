"""LoRA adapters by the dozen: those in effect are in their model, the weights of the others in tiers of memory."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ascend.tiers.store import TieredStore

_numbers = count()  # of stores: two that share a `TieredStore` keep apart
_owners: weakref.WeakKeyDictionary[nn.Module, weakref.ref[AdapterStore]] = weakref.WeakKeyDictionary()


class AdapterStore:
    """LoRA adapters of a diffusers pipeline, which change from picture to picture.

        with TieredStore([Tier("npu:0", 2**28), Tier("cpu", 2**32, pinned=True)]) as store:
            adapters = AdapterStore(pipe, store)
            adapters.load("night", "loras/night.safetensors")
            adapters.load("ink", "loras/ink.safetensors")
            adapters.use({"ink": 0.8})

    diffusers' own `set_lora_device` does so with two devices and by hand. Change adapters by this object alone: the
    parameters of one that is not in use are empty until `use` names it, also in what is saved meanwhile.

    Args:
        pipe: of a class that loads LoRA weights. Adapters that it has already are taken over, none of them in use.
        store: in which others may keep what they want.

    Raises:
        ValueError: another one has the adapters of these models.
        TierError: the store has no room for the adapters that there are. All is as it was.
    """

    def __init__(self, pipe: Any, store: TieredStore) -> None:
        self.pipe, self.store = pipe, store
        self.in_use: dict[str, float] = {}
        # By key, what a parameter got of the store, and its version then.
        self._given: dict[str, tuple[torch.Tensor, int]] = {}
        self._prefix = f"lora/{next(_numbers)}"
        self._claim()
        try:
            for name in self.names():
                self._take_away(name)
        except BaseException:
            self._give_back()
            raise
        self._set()

    def names(self) -> list[str]:
        """Of all adapters, in the order in which they came."""
        return list(dict.fromkeys(name for names in self.pipe.get_list_adapters().values() for name in names))

    def load(self, name: str, path: str | Path) -> None:
        """Read an adapter of any format that the pipeline reads; it is not in use yet.

        Raises:
            ValueError: there is one of that name, or the file has nothing for this pipeline.
            TierError: the store has no room for it. The pipeline is as it was.
        """
        if name in self.names():
            raise ValueError(f"there is an adapter '{name}' already; remove it first")
        path = Path(path)
        try:
            self.pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
            self._require(name, f"none of the weights in {path} is of a layer of this pipeline")
            self._take_away(name)
        except BaseException:
            self._remove(name)
            raise
        finally:
            self._set()  # loading puts the new one in effect

    def use(self, scales: Mapping[str, float]) -> None:
        """Have exactly these adapters in effect, each with its scale; none leaves the model as it was without any.

        Raises:
            ValueError: there is no such adapter, a scale is no finite number, or adapters are fused into the model's
                weights. Nothing has changed.
            DamagedFileError: a file of the store is damaged or gone.
        """
        if not isinstance(scales, Mapping):
            raise TypeError(f"use() takes adapters with their scales, as {{'ink': 0.8}}, not {scales!r}")
        for name, scale in scales.items():
            self._require(name)
            if not isinstance(scale, int | float) or not math.isfinite(scale):
                raise ValueError(f"the scale of adapter '{name}' must be a finite number, not {scale!r}")
        if any(getattr(module, "merged", False) for model in self._models() for module in model.modules()):
            raise ValueError(
                "adapters are fused into the weights, where they stay in effect: call unfuse_lora() first"
            )
        try:
            for name in [name for name in self.in_use if name not in scales]:
                self._take_away(name)
                del self.in_use[name]
            for name, scale in scales.items():
                self._bring(name)
                self.in_use[name] = scale
        finally:
            self._set()

    def prefetch(self, names: Iterable[str]) -> None:
        """Bring what will be used next to the first tier, while the device computes; see `TieredStore.prefetch`."""
        self.store.prefetch([key for name in names if name not in self.in_use for key, _ in self._parameters(name)])

    def remove(self, name: str) -> None:
        """Take an adapter out of the pipeline and of the store; without any, the pipeline's layers are its own again.

        Raises:
            ValueError: there is no such adapter.
        """
        self._require(name)
        self._remove(name)
        self._set()

    def _claim(self) -> None:
        for model in self._models():
            owner = _owners.get(model, lambda: None)()
            if owner is not None and owner is not self:
                raise ValueError(f"another AdapterStore has the adapters of this {type(model).__name__}: use that one")
        for model in self._models():
            _owners[model] = weakref.ref(self)

    def _remove(self, name: str) -> None:
        """Also of one that was loaded in part."""
        for key, _ in self._parameters(name):
            with suppress(KeyError):
                self.store.remove(key)
            self._given.pop(key, None)
        self.in_use.pop(name, None)
        self.pipe.delete_adapters(name)
        if not self.names():
            self.pipe.unload_lora_weights()

    def _give_back(self) -> None:
        """All adapters to their parameters, and none in the store."""
        for name in self.names():
            for key, parameter in self._parameters(name):
                with suppress(KeyError):
                    tensor = self.store.get(key)
                    if not parameter.numel():
                        parameter.data = tensor
                    self.store.remove(key)

    def _require(self, name: str, otherwise: str | None = None) -> None:
        if name not in self.names():
            there = ", ".join(self.names()) or "none"
            raise ValueError(otherwise or f"there is no adapter '{name}'; there are: {there}")

    def _set(self) -> None:
        if self.in_use:
            self.pipe.enable_lora()
            self.pipe.set_adapters(list(self.in_use), list(self.in_use.values()))
        elif self.names():
            self.pipe.disable_lora()

    def _take_away(self, name: str) -> None:
        """Into the store, which has those from before that were not written to."""
        parameters = list(self._parameters(name))
        for key, parameter in parameters:
            if not self._is_as_given(key, parameter):
                self.store.put(key, parameter.detach())
        for key, parameter in parameters:
            self._given.pop(key, None)
            parameter.data = parameter.data.new_empty(0)

    def _is_as_given(self, key: str, parameter: nn.Parameter) -> bool:
        """Whether nothing was written to it; that it was moved or cast, as by a preset, is none of the adapter's."""
        given, version = self._given.get(key, (None, 0))
        if given is None or parameter._version != version:
            return False
        if parameter.data_ptr() == given.data_ptr():
            return True
        return torch.equal(given.to(parameter.device, parameter.dtype), parameter.detach())

    def _bring(self, name: str) -> None:
        for key, parameter in self._parameters(name):
            if key in self._given or parameter.numel():  # it was loaded past this object
                continue
            tensor = self.store.get(key)
            parameter.data = tensor.to(parameter.device, parameter.dtype)  # of the model, which may have changed
            self._given[key] = tensor, parameter._version

    def _models(self) -> list[nn.Module]:
        return [model for model in self.pipe.components.values() if isinstance(model, nn.Module)]

    def _parameters(self, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Of an adapter, by their keys in the store."""
        for component, module in self.pipe.components.items():
            for path, parameter in module.named_parameters() if isinstance(module, nn.Module) else ():
                if _is_of(adapter, path):
                    yield f"{self._prefix}/{component}.{path}", parameter


def _is_of(adapter: str, path: str) -> bool:
    """Whether a parameter is of `adapter`: PEFT names it `...lora_A.ADAPTER.weight` or the like."""
    parts = path.split(".")
    return any(kind.startswith("lora_") and name == adapter for kind, name in zip(parts, parts[1:], strict=False))
