"""LoRA adapters by the dozen: those in effect are in their model, the weights of the others in tiers of memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ascend.tiers.store import TieredStore


class AdapterStore:
    """LoRA adapters of a diffusers pipeline, which change from picture to picture.

        with TieredStore([Tier("npu:0", 2**28), Tier("cpu", 2**32, pinned=True)]) as store:
            adapters = AdapterStore(pipe, store)
            adapters.load("night", "loras/night.safetensors")
            adapters.load("ink", "loras/ink.safetensors")
            adapters.use({"ink": 0.8})

    diffusers' own `set_lora_device` does so with two devices and by hand. Change adapters by this object alone: the
    parameters of one that is not in use are empty until `use` names it.

    Args:
        pipe: of a class that loads LoRA weights. Adapters that it has already are taken over, none of them in use.
        store: in which others may keep what they want under keys that do not begin with `lora/`.
    """

    def __init__(self, pipe: Any, store: TieredStore) -> None:
        self.pipe, self.store = pipe, store
        self.in_use: dict[str, float] = {}
        self._given: dict[str, tuple[torch.Tensor, int]] = {}  # by key, what a parameter got, and its version then
        for name in self.names():
            self._take_away(name)
        if self.names():
            pipe.disable_lora()

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
            if name in self.names():
                self.remove(name)
            raise
        finally:
            self._set()  # loading puts the new one in effect

    def use(self, scales: Mapping[str, float]) -> None:
        """Have exactly these adapters in effect, each with its scale; none leaves the model as it was without any.

        Raises:
            ValueError: there is no such adapter. Nothing has changed.
            DamagedFileError: a file of the store is damaged or gone.
        """
        for name in scales:
            self._require(name)
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
        for key, _ in self._parameters(name):
            with suppress(KeyError):
                self.store.remove(key)
            self._given.pop(key, None)
        self.in_use.pop(name, None)
        self.pipe.delete_adapters(name)
        if not self.names():
            self.pipe.unload_lora_weights()
        self._set()

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
            given, version = self._given.get(key, (None, 0))
            if given is None or parameter.data_ptr() != given.data_ptr() or parameter._version != version:
                self.store.put(key, parameter.detach())
        for key, parameter in parameters:
            self._given.pop(key, None)
            parameter.data = parameter.data.new_empty(0)

    def _bring(self, name: str) -> None:
        for key, parameter in self._parameters(name):
            if key not in self._given:
                tensor = parameter.data = self.store.get(key)
                self._given[key] = tensor, parameter._version

    def _parameters(self, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Of an adapter, by their keys in the store."""
        for component, module in self.pipe.components.items():
            for path, parameter in module.named_parameters() if isinstance(module, nn.Module) else ():
                if _is_of(adapter, path):
                    yield f"lora/{component}.{path}", parameter


def _is_of(adapter: str, path: str) -> bool:
    """Whether a parameter is of `adapter`: PEFT names it `...lora_A.ADAPTER.weight` or the like."""
    parts = path.split(".")
    return any(kind.startswith("lora_") and name == adapter for kind, name in zip(parts, parts[1:], strict=False))
