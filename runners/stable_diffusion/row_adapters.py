"""The LoRA adapters that rows of a batch name, and a worker's change from one row's to the next's."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from diffusers import StableDiffusionPipeline

from ascend import AdapterStore, Tier, TieredStore
from ascend.tiers import TierError
from runners.cli import UserError, is_out_of_memory
from runners.stable_diffusion.adapters import Lora, check_loras
from runners.stable_diffusion.arguments import lora as parse_lora
from runners.weight_files import digest_of_file, first_line

GIB = 2**30
ON_DEVICE, WITH_HOST = GIB // 8, 2 * GIB  # of adapters that are not in use


class RowAdapter(NamedTuple):
    """An adapter of a row: its file, how strong it is, and what is in the file."""

    path: str
    scale: float
    digest: str


class AdapterFiles:
    """Reads what rows say of adapters; a file is looked at once.

    Args:
        folder: what relative paths are relative to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.digests: dict[Path, str] = {}

    def read(self, value: object) -> str:
        """The adapters of a row as JSON, empty without any. `value` is FILE, FILE:SCALE, or a list of such.

        Raises:
            ValueError: it is none of that, a file is no adapter, or two are the same.
        """
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"lora must be FILE, FILE:SCALE or a list of such, not {value!r:.40}")
        adapters = [self._read(text) for text in texts]
        if len({adapter.digest for adapter in adapters}) < len(adapters):
            raise ValueError("lora names one adapter twice: give it once, with one scale")
        return json.dumps(adapters) if adapters else ""

    def _read(self, text: str) -> RowAdapter:
        try:
            path, scale = parse_lora(text)
            path = self.folder / path
            if path not in self.digests:
                check_loras([Lora(path, scale)])
                self.digests[path] = digest_of_file(path)
        except (UserError, argparse.ArgumentTypeError, OSError) as error:
            raise ValueError(f"lora: {str(error).removeprefix('--lora ')}") from error
        return RowAdapter(str(path), scale, self.digests[path])


def content_of(adapters: str) -> list[tuple[str, float]]:
    """What decides a picture's look of what `AdapterFiles.read` returned: files count by their content."""
    return sorted((adapter.digest, adapter.scale) for adapter in _parse(adapters))


def loras_of(adapters: str) -> list[Lora]:
    return [Lora(Path(adapter.path), adapter.scale) for adapter in _parse(adapters)]


def _parse(adapters: str) -> list[RowAdapter]:
    return [RowAdapter(*entry) for entry in json.loads(adapters or "[]")]


class AdapterSwitch:
    """Has the adapters of one row after the other in effect. Those of earlier rows stay with the host, as many as fit:
    the one that came first goes first."""

    def __init__(self, pipe: StableDiffusionPipeline) -> None:
        device = pipe._execution_device
        host = [Tier("cpu", WITH_HOST, pinned=device.type != "cpu")]
        self.store = AdapterStore(
            pipe, TieredStore(host if device.type == "cpu" else [Tier(device, ON_DEVICE), *host])
        )

    def use(self, adapters: str) -> None:
        """Those of a row, as `AdapterFiles.read` gives them.

        Raises:
            UserError: a file is gone or another one than when the run began, or no adapter of this model.
        """
        wanted = _parse(adapters)
        for adapter in wanted:
            if adapter.digest not in self.store.names():
                self._load(adapter, [other.digest for other in wanted])
        self.store.use({adapter.digest: adapter.scale for adapter in wanted})

    def _load(self, adapter: RowAdapter, spared: Sequence[str]) -> None:
        try:
            if digest_of_file(Path(adapter.path)) != adapter.digest:
                raise UserError(
                    f"lora {adapter.path} is not the file that the run began with, which names its pictures"
                )
        except OSError as error:
            raise UserError(f"lora {adapter.path}: {error.strerror or error}") from error
        while True:
            try:
                self.store.load(adapter.digest, adapter.path)
                return
            except TierError:
                dispensable = [name for name in self.store.names() if name not in spared]
                if not dispensable:
                    raise
                self.store.remove(dispensable[0])
            except Exception as error:  # of any kind: the file is the user's
                if is_out_of_memory(error):
                    raise
                raise UserError(f"lora {adapter.path} does not fit this model: {first_line(error)}") from error
