"""What the components of a pipeline make and free on a device while a picture is drawn, for any placement of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from ascend.planner.activations import peak_of
from ascend.planner.allocator import Event
from ascend.streaming.blocks import aligned
from ascend.streaming.buffers import BUFFERS

RESIDENT, LENT, STREAMED, FROM_DISK = "resident", "while it runs", "streamed", "streamed from disk"
PHASES = ("encode", "denoise", "decode")
STEPS = 2  # the second one finds what the first left in the allocator; later ones find the same


@dataclass(frozen=True)
class Weights:
    """Of a component, in bytes of its tensors, in the order in which they go to the device.

    Attributes:
        tensors: all.
        places: all, as streaming brings them, with the name of the block that alone has them; None: they are around.
        beside: those that stay on the device while what runs is lent.
        blocks: bytes of a buffer for each block, by its name and for each dtype.
        kept: blocks that stay on the device where the others are streamed.
    """

    tensors: tuple[int, ...]
    places: tuple[tuple[str | None, int], ...]
    beside: tuple[int, ...]
    blocks: dict[str, Mapping[Any, int]]
    kept: tuple[str, ...] = ()

    @cached_property
    def around(self) -> tuple[int, ...]:
        """Those that are on the device while it is streamed."""
        return tuple(size for name, size in self.places if name is None or name in self.kept)

    @cached_property
    def block(self) -> dict[Hashable, int]:
        """A buffer that holds any of its blocks, for each dtype; empty if it has none."""
        sizes: dict[Hashable, int] = {}
        for name, block in self.blocks.items():
            for dtype, size in block.items() if name not in self.kept else ():
                sizes[dtype] = max(sizes.get(dtype, 0), size)
        return sizes

    def on_device(self, where: str) -> tuple[int, ...]:
        """While another component runs."""
        return {RESIDENT: self.tensors, LENT: self.beside}.get(where, self.around)


@dataclass(frozen=True)
class Run:
    """One way in which a component runs, once a picture or in each step.

    Attributes:
        phase: of PHASES.
        events: what a call makes and frees, as far as is known.
        inputs: bytes of each of its tensors, which are kept until the picture is there.
        loan: bytes of the buffers for what runs, where that is lent.
        streamed: bytes of the blocks of what runs, by their names in that.
        cast: the component's weights meanwhile, where the pipeline casts them to another dtype and back.
    """

    phase: str
    events: list[Event]
    inputs: tuple[int, ...]
    loan: tuple[int, ...]
    streamed: dict[str, int]
    cast: Weights | None = None

    @cached_property
    def peak(self) -> int:
        """Bytes of activations at once, as far as is known."""
        return peak_of(self.events)


@dataclass(frozen=True)
class Part:
    """A component.

    Attributes:
        unknown: why it is not known what its calls take beside weights, if it is not.
    """

    name: str
    weights: Weights
    runs: tuple[Run, ...]
    unknown: str | None = None

    @property
    def denoises(self) -> bool:
        return any(run.phase == "denoise" for run in self.runs)

    @property
    def casts(self) -> tuple[Weights, ...]:
        return tuple(run.cast for run in self.runs if run.cast)

    def keeping(self, number: int) -> Part:
        """With so many of its blocks on the device.

        They lie between those that are streamed, of which each then has more than one block to come behind.
        """
        names = list(self.weights.blocks)
        shares = [place * number // len(names) for place in range(len(names) + 1)]
        kept = tuple(name for name, (before, after) in zip(names, pairwise(shares), strict=True) if after > before)
        return replace(self, weights=replace(self.weights, kept=kept))

    def may_keep(self, where: str) -> bool:
        """Whether blocks may fill the memory that is left: not where it is not known what a call takes of that."""
        return self.denoises and where in (STREAMED, FROM_DISK) and self.unknown is None

    def growth(self, run: Run, where: str) -> int:
        """Bytes that it has more of the device while it runs, activations and buffers for blocks aside."""
        cast = total(run.cast.on_device(where)) - total(self.weights.on_device(where)) if run.cast else 0
        return cast + (total(run.loan) if where == LENT else 0)


def total(sizes: Iterable[int]) -> int:
    return sum(map(aligned, sizes))


def buffer_of(pairs: list[tuple[Part, str]]) -> dict[Hashable, int]:
    """Bytes, for each dtype, of a buffer that holds any block of the parts that are streamed."""
    sizes: dict[Hashable, int] = {}
    for part, where in pairs:
        for weights in (part.weights, *part.casts) if where in (STREAMED, FROM_DISK) else ():
            for dtype, size in weights.block.items():
                sizes[dtype] = max(sizes.get(dtype, 0), size)
    return sizes


def in_order(pairs: list[tuple[Part, str]]) -> Iterator[tuple[str, list[tuple[Part, str, Run]]]]:
    """The phases that there are, with what runs in each."""
    for phase in PHASES:
        runs = [(part, where, run) for part, where in pairs for run in part.runs if run.phase == phase]
        if runs:
            yield phase, runs


class Tape:
    """Events of which each tensor has a number of its own."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.count = 0

    def make(self, sizes: Iterable[int]) -> range:
        first = self.count
        for size in sizes:
            self.events.append(Event(self.count, size))
            self.count += 1
        return range(first, self.count)

    def free(self, numbers: range) -> None:
        self.events += [Event(number, None) for number in numbers]

    def cast(self, numbers: range, sizes: Iterable[int]) -> range:
        """One after the other becomes a tensor of another size."""
        first = self.count
        for number, size in zip(numbers, sizes, strict=True):
            self.make([size])
            self.events.append(Event(number, None))
        return range(first, self.count)

    def copy(self, events: list[Event]) -> None:
        self.events += [Event(self.count + number, size) for number, size in events]
        self.count += sum(size is not None for _, size in events)


def activity_of(parts: list[Part], choice: tuple[str, ...]) -> list[Event]:
    """All that is made and freed on the device, from the first weight to the picture."""
    pairs = list(zip(parts, choice, strict=True))
    tape, buffer = Tape(), buffer_of(pairs)
    held = {part.name: tape.make(part.weights.on_device(where)) for part, where in pairs}
    has_buffers = False
    for phase, runs in in_order(pairs):
        for _, _, run in runs:
            tape.make(run.inputs)
        for _ in range(STEPS if phase == "denoise" else 1):
            for part, where, run in runs:
                if run.cast:
                    held[part.name] = tape.cast(held[part.name], run.cast.on_device(where))
                if where in (STREAMED, FROM_DISK) and not has_buffers:
                    has_buffers = True  # from now on
                    for _ in range(BUFFERS):
                        tape.make(buffer.values())
                lent = tape.make(run.loan if where == LENT else ())
                tape.copy(run.events)
                tape.free(lent)
                if run.cast:
                    held[part.name] = tape.cast(held[part.name], part.weights.on_device(where))
    return tape.events
