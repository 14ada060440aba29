"""What the components of a pipeline make and free on a device while a picture is drawn, for any placement of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from ascend.planner.activations import peak_of
from ascend.planner.allocator import Event
from ascend.streaming.blocks import aligned
from ascend.streaming.buffers import BUFFERS

RESIDENT, LENT, STREAMED, FROM_DISK = "resident", "while it runs", "streamed", "streamed from disk"
PHASES = ("encode", "denoise", "decode")
STEPS = 2  # the second one finds what the first left in the allocator; later ones find the same


@dataclass(frozen=True)
class Run:
    """One way in which a component runs, once a picture or in each step.

    Attributes:
        phase: of PHASES.
        events: what a call makes and frees; None: not known.
        inputs: bytes of each of its tensors, which are kept until the picture is there.
        loan: bytes of the buffers for what runs, where that is lent.
        streamed: bytes of the blocks of what runs.
    """

    phase: str
    events: list[Event] | None
    inputs: tuple[int, ...]
    loan: tuple[int, ...]
    streamed: int

    @cached_property
    def peak(self) -> int:
        """Bytes of activations at once, as far as is known."""
        return peak_of(self.events or [])


@dataclass(frozen=True)
class Part:
    """A component, in bytes of its tensors, in the order in which they go to the device.

    Attributes:
        weights: of all.
        around: of those in no block.
        beside: of those that stay on the device while what runs is lent.
        block: of a buffer that holds any of its blocks, for each dtype; empty if it has none.
    """

    name: str
    weights: tuple[int, ...]
    around: tuple[int, ...]
    beside: tuple[int, ...]
    block: dict[Hashable, int]
    runs: tuple[Run, ...]

    @property
    def denoises(self) -> bool:
        return any(run.phase == "denoise" for run in self.runs)

    def stays(self, where: str) -> tuple[int, ...]:
        """What is on the device at all times."""
        return {RESIDENT: self.weights, LENT: self.beside}.get(where, self.around)


def total(sizes: Iterable[int]) -> int:
    return sum(map(aligned, sizes))


def buffer_of(pairs: list[tuple[Part, str]]) -> dict[Hashable, int]:
    """Bytes, for each dtype, of a buffer that holds any block of the parts that are streamed."""
    sizes: dict[Hashable, int] = {}
    for part, where in pairs:
        for dtype, size in part.block.items() if where in (STREAMED, FROM_DISK) else ():
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

    def copy(self, events: list[Event]) -> None:
        self.events += [Event(self.count + number, size) for number, size in events]
        self.count += sum(size is not None for _, size in events)


def activity_of(parts: list[Part], choice: tuple[str, ...]) -> list[Event]:
    """All that is made and freed on the device, from the first weight to the picture."""
    pairs = list(zip(parts, choice, strict=True))
    tape, buffer = Tape(), buffer_of(pairs)
    for part, where in pairs:
        tape.make(part.stays(where))
    has_buffers = False
    for phase, runs in in_order(pairs):
        for _, _, run in runs:
            tape.make(run.inputs)
        for _ in range(STEPS if phase == "denoise" else 1):
            for _, where, run in runs:
                if where in (STREAMED, FROM_DISK) and not has_buffers:
                    has_buffers = True  # from now on
                    for _ in range(BUFFERS):
                        tape.make(buffer.values())
                lent = tape.make(run.loan if where == LENT else ())
                tape.copy(run.events or [])
                tape.free(lent)
    return tape.events
