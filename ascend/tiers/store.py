"""A store of tensors that goes down through tiers of memory: what is used is at the top, and nothing is dropped."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ascend.device import find_device
from ascend.tiers.media import DamagedFileError, Folder, InMemory, Memory, OnDisk, TierError
from ascend.tiers.plan import Plan, Resident
from ascend.tiers.streams import CopyStream

logger = logging.getLogger(__name__)

MIB = 2**20
# Budgets of `default_store` in MiB, the fastest tier's first, by the type of the device.
DEFAULT_BUDGETS = {"npu": (2000, 8000, 32000), "cuda": (2000, 8000, 32000), "cpu": (4000, 16000)}


@dataclass(frozen=True)
class Tier:
    """Where tensors are kept, and how much of it they may take.

    Args:
        place: the name of a device, as for `ascend.device.find_device`, or a folder as a `Path`.
        budget: bytes. Those of tensors: pinned memory is handed out in powers of two, on top of which torch keeps it.
        pinned: whether host memory is of pages that an accelerator copies from while the program goes on.
    """

    place: str | torch.device | Path
    budget: int
    pinned: bool = False


@dataclass
class _Entry:
    """A tensor of the store.

    Attributes:
        sizes: bytes that it takes in each tier.
        used: the number of the call that used it last.
        where: the tier it is in, and its data there: in one attribute, as an interrupt may come between two.
    """

    key: str
    shape: torch.Size
    dtype: torch.dtype
    nbytes: int
    sizes: list[int]
    priority: float
    used: int
    where: tuple[int, InMemory | OnDisk]


@dataclass
class _Counters:
    hits: list[int]
    misses: int = 0
    promotions: int = 0
    demotions: int = 0
    unpromoted: int = 0
    bytes_moved: int = 0
    seconds_waited: float = 0.0


@dataclass
class _Leaving:
    """What takes `size` bytes of tier `level` until `ready`, an event after the copy that reads it, has passed."""

    level: int
    size: int
    data: InMemory = field(repr=False)
    ready: Any


class TieredStore:
    """Tensors by name, in tiers of which each has a budget that is never exceeded, not while tensors move either.

        tiers = [Tier("npu:0", 2 * 2**30), Tier("cpu", 8 * 2**30, pinned=True), Tier(Path("swap"), 32 * 2**30)]
        with TieredStore(tiers) as store:
            store.put("weight", weight)
            store.prefetch(["weight"])  # while something else computes
            weight = store.get("weight")

    A tensor is put into the first tier, and `get` brings it back there. What is in the way goes down a tier: what has
    the least priority, and of that what was used longest ago. Copies to an accelerator run on a stream of the store's
    own. The budgets hold for what the store keeps: a tensor that `get` returned is kept alive by its user as well.

    Threads may share a store; a process that is forked may not use its parent's, and leaves its files alone.

    Args:
        tiers: the fastest first. An accelerator can only be the first, and a folder only the last.

    Raises:
        ValueError: the tiers are in another order, or a budget is not positive, or pinned memory makes no sense.
        DeviceError: there is no such device.
        TierError: the folder cannot be written.
    """

    def __init__(self, tiers: Sequence[Tier]) -> None:
        devices = _find_devices(tiers)
        self.tiers = tuple(tiers)
        self.device = devices[0] or torch.device("cpu")  # of what `get` returns
        self._owner = os.getpid()
        self._lock = threading.RLock()
        self._clock = count()
        self._entries: dict[str, _Entry] = {}
        self._leaving: list[_Leaving] = []
        self._counters = _Counters([0] * len(tiers))
        self._is_closed = False
        self._stream = CopyStream(self.device)
        self._media = [
            Memory(device, tier.pinned) if device else Folder(Path(str(tier.place)))
            for tier, device in zip(tiers, devices, strict=True)
        ]

    def put(self, key: str, tensor: torch.Tensor, priority: float = 0) -> None:
        """Keep a copy of `tensor`, in place of what `key` held before, which counts until then.

        Args:
            tensor: of any shape and dtype, on any device. Its strides are not kept.
            priority: the least goes down first.

        Raises:
            ValueError: the tensor requires gradients, which a store would lose, or has no plain values.
            TierError: it fits in no tier beside the others, or the folder cannot be written. All else is as it was.
        """
        _require_values(tensor)
        with self._using():
            sizes = [medium.size(tensor) for medium in self._media]
            levels = range(len(self.tiers))
            level = next((level for level in levels if self._make_room(sizes[level], level, set())), None)
            if level is None:
                raise TierError(f"'{key}' fits in no tier: {self._describe_room(sizes)}")
            self._stream.follow(tensor)
            source = InMemory(tensor.detach().resolve_conj().resolve_neg())
            data = self._write(source, tensor.shape, tensor.dtype, self._media[level])
            if isinstance(data, InMemory) and data.ready is not None and tensor.is_pinned():
                data.ready.synchronize()  # the caller may write into it next
            entry = _Entry(
                key, tensor.shape, tensor.dtype, tensor.nbytes, sizes, priority, next(self._clock), (level, data)
            )
            replaced = self._entries.get(key)
            self._entries[key] = entry
            if replaced is not None:
                replaced.where[1].erase()

    def get(self, key: str) -> torch.Tensor:
        """The tensor that was put, to the bit, contiguous, on the device of the first tier, which is `self.device`.

        It shares its memory with the store: put a changed one instead of writing into it. Where no room can be made in
        the first tier it is a copy of the caller's own.

        Raises:
            KeyError: there is no such tensor.
            DamagedFileError: its file is damaged or gone.
        """
        start = time.perf_counter()
        with self._using():
            entry = self._find(key)
            entry.used = next(self._clock)
            level = entry.where[0]
            self._promote(entry, {key})
            tensor = self._hand_out(entry)
            self._counters.hits[level] += 1
            self._counters.seconds_waited += time.perf_counter() - start
            return tensor

    def prefetch(self, keys: Iterable[str]) -> None:
        """Bring tensors to the first tier, in this order, as far as it has room for them all beside each other.

        Copies from pinned memory to an accelerator go on after this returns, and `get` waits for its tensor's alone,
        on the device. Files are read, and what is in the way is demoted, before it returns.

        Raises:
            KeyError: there is no such tensor.
            DamagedFileError: a file is damaged or gone.
        """
        with self._using():
            wanted = [self._find(key) for key in keys]
            for entry in wanted:
                entry.used = next(self._clock)
            spared: set[str] = set()
            for entry in wanted:
                spared.add(entry.key)
                self._promote(entry, spared)

    def remove(self, key: str) -> None:
        """Forget a tensor and give back what it takes.

        Raises:
            KeyError: there is no such tensor.
        """
        with self._using():
            self._entries.pop(self._find(key).key).where[1].erase()

    def stats(self) -> dict[str, Any]:
        """What is where, and what happened so far.

        Returns:
            `tiers`, for each its `place`, `budget` and `used` bytes, `tensors` and `hits`, the calls of `get` that
            found their tensor there; `misses`, the calls that named a key that is not there; `promotions` and
            `demotions`; `unpromoted`, the calls of `get` for whose tensor no room could be made in the first tier;
            `bytes_moved`, of tensors, by these three; `seconds_waited`, those of the host in `get`.
        """
        with self._using():
            counters = self._counters
            levels = [entry.where[0] for entry in self._entries.values()]
            tiers = [
                {
                    "place": str(tier.place),
                    "budget": tier.budget,
                    "used": self._used(level),
                    "tensors": levels.count(level),
                    "hits": counters.hits[level],
                }
                for level, tier in enumerate(self.tiers)
            ]
            totals = {name: value for name, value in vars(counters).items() if name != "hits"}
            return {"tiers": tiers} | totals

    def close(self) -> None:
        """Give back all memory and remove all files. The store is of no use after that; in a forked child this does
        nothing."""
        if os.getpid() != self._owner:
            return
        with self._lock:
            self._is_closed = True
            self._settle(wait=True)
            self._entries.clear()
            for medium in self._media:
                medium.close()

    def __enter__(self) -> TieredStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _using(self) -> Iterator[None]:
        if os.getpid() != self._owner:  # before the lock, which a thread of the parent may have held at the fork
            raise TierError(f"this store is of process {self._owner}: make one in each process, after the fork")
        with self._lock:
            if self._is_closed:
                raise TierError("this store is closed")
            self._settle(wait=False)
            yield

    def _find(self, key: str) -> _Entry:
        if key not in self._entries:
            self._counters.misses += 1
            raise KeyError(f"the store holds no '{key}'")
        return self._entries[key]

    def _used(self, level: int) -> int:
        kept = sum(entry.sizes[level] for entry in self._entries.values() if entry.where[0] == level)
        return kept + sum(leaving.size for leaving in self._leaving if leaving.level == level)

    def _describe_room(self, sizes: Sequence[int]) -> str:
        tiers = [
            f"{tier.place} has {tier.budget - self._used(level)} of {tier.budget} bytes free and {size} are needed"
            for level, (tier, size) in enumerate(zip(self.tiers, sizes, strict=True))
        ]
        return f"{', '.join(tiers)}; remove tensors or raise a budget"

    def _make_room(self, size: int, level: int, spared: set[str]) -> bool:
        """Demote what is in the way of `size` bytes in tier `level`, but for `spared`. False: nothing was moved."""
        if size > self.tiers[level].budget:
            return False
        plan = self._plan(spared)
        is_possible = plan.make_room(size, level)
        if self._leaving and (plan.moves or not is_possible):  # less may have to go once what is leaving has left
            self._settle(wait=True)
            plan = self._plan(spared)
            is_possible = plan.make_room(size, level)
        if is_possible:
            for resident, _, target in plan.moves:
                self._move(self._entries[resident.key], target)
        return is_possible

    def _plan(self, spared: set[str]) -> Plan:
        residents: list[list[Resident]] = [[] for _ in self.tiers]
        for entry in self._entries.values():
            if entry.key not in spared:
                residents[entry.where[0]].append(Resident((entry.priority, entry.used), entry.key, tuple(entry.sizes)))
        return Plan([tier.budget - self._used(level) for level, tier in enumerate(self.tiers)], residents)

    def _promote(self, entry: _Entry, spared: set[str]) -> None:
        """Move up as far as room can be made. A folder that cannot be written leaves tensors where they are."""
        try:
            for level in range(entry.where[0]):
                if self._make_room(entry.sizes[level], level, spared):
                    self._move(entry, level)
                    return
        except DamagedFileError:
            raise
        except TierError as error:
            logger.warning("'%s' stays in %s: %s", entry.key, self.tiers[entry.where[0]].place, error)

    def _move(self, entry: _Entry, target: int) -> None:
        source, data = entry.where
        moved = self._write(data, entry.shape, entry.dtype, self._media[target])
        if isinstance(moved, InMemory) and isinstance(data, InMemory) and moved.ready is not None:
            self._leaving.append(_Leaving(source, entry.sizes[source], data, moved.ready))
        entry.where = target, moved
        data.erase()
        if target < source:
            self._counters.promotions += 1
        else:
            self._counters.demotions += 1
        self._counters.bytes_moved += entry.nbytes

    def _write(
        self, data: InMemory | OnDisk, shape: torch.Size, dtype: torch.dtype, medium: Memory | Folder
    ) -> InMemory | OnDisk:
        """A copy of `data`, as a contiguous tensor, on `medium`."""
        with self._stream.running():
            if isinstance(medium, Folder):
                assert isinstance(data, InMemory), "a folder is the last tier, and nothing comes up into it"
                return medium.write(data.tensor)
            target = medium.empty(shape, dtype)
            data.copy_to(target)
            return InMemory(target, self._stream.record() if target.device == self.device else None)

    def _hand_out(self, entry: _Entry) -> torch.Tensor:
        level, data = entry.where
        self._counters.unpromoted += level > 0
        if isinstance(data, OnDisk) or data.tensor.device != self.device:
            data = self._write(data, entry.shape, entry.dtype, Memory(self.device, pinned=False))
            assert isinstance(data, InMemory)
            if data.ready is not None:
                data.ready.synchronize()  # what it is copied from may move next
            self._counters.bytes_moved += entry.nbytes
        self._stream.hand_over(data.tensor, data.ready)
        return data.tensor.detach()  # another tensor on the same memory: gradients asked of it are not the store's

    def _settle(self, wait: bool) -> None:
        """Give up what has left its tier, or, with `wait`, all that is leaving."""
        if wait:
            for leaving in self._leaving:
                leaving.ready.synchronize()
        self._leaving = [leaving for leaving in self._leaving if not leaving.ready.query()]


def default_store(device: torch.device, folder: Path) -> TieredStore:
    """A store on `device`, in host memory and in `folder`, with budgets of 2000, 8000 and 32000 MiB.

    On the CPU: in host memory and in `folder`, with 4000 and 16000 MiB.

    Raises:
        DeviceError: there is no such device.
        TierError: the folder cannot be written.
    """
    budgets = [mebibytes * MIB for mebibytes in DEFAULT_BUDGETS[device.type]]
    host = [] if device.type == "cpu" else [Tier("cpu", budgets[1], pinned=True)]
    return TieredStore([Tier(device, budgets[0]), *host, Tier(folder, budgets[-1])])


def _find_devices(tiers: Sequence[Tier]) -> list[torch.device | None]:
    """The device of each tier, None for a folder."""
    if not tiers:
        raise ValueError("a store needs at least one tier")
    devices = [None if isinstance(tier.place, Path) else find_device(tier.place) for tier in tiers]
    kinds = ["folder" if device is None else device.type for device in devices]
    for position, (tier, kind) in enumerate(zip(tiers, kinds, strict=True)):
        if tier.budget <= 0:
            raise ValueError(f"the tier {tier.place} has a budget of {tier.budget} bytes: give it some")
        if kind == "folder" and position != len(tiers) - 1:
            raise ValueError(f"the tier {tier.place} is a folder, which can only be the last")
        if kind not in ("cpu", "folder") and position != 0:
            raise ValueError(f"the tier {tier.place} is an accelerator, which can only be the first")
        if tier.pinned and (kind != "cpu" or kinds[0] == "cpu"):
            raise ValueError(f"the tier {tier.place} cannot be pinned: only host memory below an accelerator can")
    return devices


def _require_values(tensor: torch.Tensor) -> None:
    if tensor.requires_grad:
        raise ValueError("the tensor requires gradients, which would not reach it from a store: put its .detach()")
    if tensor.layout is not torch.strided or tensor.is_meta:
        raise ValueError(f"the tensor is {tensor.layout} on {tensor.device}: put a dense one that has values")
