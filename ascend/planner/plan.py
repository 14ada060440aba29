"""Where each model of a pipeline is while it waits, so that a picture is drawn soonest in the memory there is."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

from ascend.streaming.buffers import BUFFERS

GIB = 2**30
RESIDENT, LENT, STREAMED, FROM_DISK = "resident", "while it runs", "streamed", "streamed from disk"


class Part(NamedTuple):
    """A component: bytes of all weights, of its largest block (0: it has none) and of what is around its blocks."""

    name: str
    weights: int
    block: int
    around: int
    phase: str
    activations: int | None  # bytes; None: not known


class Speed(NamedTuple):
    """Bytes a second from host memory to the device, and from disk to host memory."""

    link: float
    disk: float


@dataclass(frozen=True)
class Placement:
    """Where one component is, and the seconds that its way to the device takes in a picture."""

    name: str
    where: str
    weights: int
    on_device: int
    seconds: float
    why: str


@dataclass(frozen=True)
class MemoryPlan:
    """Attributes:
    placements: of each component.
    buffers: bytes of the two buffers that streamed blocks share.
    phases: bytes on the device in each phase, activations included.
    limit: bytes that there are.
    host: bytes of weights that stay in host memory.
    seconds_per_step: that weights are under way in a denoising step, if nothing is hidden behind computation.
    unknown: components whose activations are not known.
    """

    placements: tuple[Placement, ...]
    buffers: int
    phases: dict[str, int]
    limit: int
    host: int
    seconds_per_step: float
    unknown: tuple[str, ...]

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def is_resident(self) -> bool:
        return all(placement.where == RESIDENT for placement in self.placements)

    def where(self, name: str) -> str:
        return next(placement.where for placement in self.placements if placement.name == name)

    def table(self) -> str:
        rows = [("component", "weights", "where", "on the device", "s a picture", "why")]
        rows += [
            (p.name, gib(p.weights), p.where, gib(p.on_device), f"{p.seconds:.2f}", p.why) for p in self.placements
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        phases = ", ".join(f"{phase} {gib(size)}" for phase, size in self.phases.items())
        lines.append(f"peak {gib(self.peak)} of {gib(self.limit)} ({phases}); buffers {gib(self.buffers)}")
        lines += [
            f"{name}: what its calls take beside weights is not known, and not in the plan" for name in self.unknown
        ]
        lines.append(f"weights are under way {self.seconds_per_step:.2f} s a step, less what computing hides")
        return "\n".join(lines)

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"peak": self.peak}, indent=2)


class PlanError(RuntimeError):
    """No placement fits; the message says what is missing and what would do."""


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def choose_plan(
    parts: list[Part], limit: int, host: int, steps: int, speed: Speed, allowed: tuple[str, ...] | None = None
) -> MemoryPlan:
    """The placement whose weights are under way for the shortest time, of those that fit.

    Args:
        parts: in the order in which they run.
        limit: bytes of device memory for all of it.
        host: bytes of host memory for weights that are not on the device.
        steps: denoising steps of a picture.
        allowed: the ways in which a denoiser may be placed; all by default. Others may always leave the device.

    Raises:
        PlanError: none fits.
    """
    plans = [make_plan(parts, choice, limit, steps, speed) for choice in _choices(parts, allowed)]
    fitting = [plan for plan in plans if plan.peak <= limit and plan.host <= host]
    if not fitting:
        smallest = min(plans, key=lambda plan: (plan.peak > limit, max(0, plan.host - host), plan.peak))
        raise PlanError(
            f"no placement fits: the smallest takes {gib(smallest.peak)} of the device's {gib(limit)} "
            f"({', '.join(f'{p.name} {p.where}' for p in smallest.placements)}) and {gib(smallest.host)} of the "
            f"host's {gib(host)}; take a smaller --height and --width, fewer --num_images, or a chip with more memory"
        )
    return min(fitting, key=lambda plan: (sum(p.seconds for p in plan.placements), plan.peak))


def _choices(parts: list[Part], allowed: tuple[str, ...] | None) -> Iterator[tuple[str, ...]]:
    everything = (RESIDENT, LENT, STREAMED, FROM_DISK)
    for choice in itertools.product(everything, repeat=len(parts)):
        pairs = list(zip(parts, choice, strict=True))
        if any(where in (STREAMED, FROM_DISK) and not part.block for part, where in pairs):
            continue
        if any(part.phase == "denoise" and where == LENT for part, where in pairs):
            continue  # streaming is never worse
        if allowed and any(part.phase == "denoise" and where not in allowed for part, where in pairs):
            continue
        yield choice


def make_plan(parts: list[Part], choice: tuple[str, ...], limit: int, steps: int, speed: Speed) -> MemoryPlan:
    """What a placement of `parts` takes."""
    streamed = [part for part, where in zip(parts, choice, strict=True) if where in (STREAMED, FROM_DISK)]
    buffers = BUFFERS * max((part.block for part in streamed), default=0)
    placements, phases = [], dict.fromkeys((part.phase for part in parts), buffers)
    for part, where in zip(parts, choice, strict=True):
        always = {RESIDENT: part.weights, LENT: 0}.get(where, part.around)
        for phase in phases:
            phases[phase] += always
        runs = always + (part.weights if where == LENT else 0)
        seconds = seconds_under_way(part, where, steps, speed)
        placements.append(Placement(part.name, where, part.weights, runs, seconds, _why(part, where)))
    for phase in phases:
        here = [(part, where) for part, where in zip(parts, choice, strict=True) if part.phase == phase]
        phases[phase] += max((part.weights if where == LENT else 0) + (part.activations or 0) for part, where in here)
    return MemoryPlan(
        tuple(placements),
        buffers,
        phases,
        limit,
        sum(p.weights for p in placements if p.where in (LENT, STREAMED)),
        sum(p.seconds / steps for p, part in zip(placements, parts, strict=True) if part.phase == "denoise"),
        tuple(part.name for part in parts if part.activations is None),
    )


def seconds_under_way(part: Part, where: str, steps: int, speed: Speed) -> float:
    """Of the weights of one picture on their way to the device."""
    if where == RESIDENT:
        return 0.0
    times = steps if part.phase == "denoise" else 1
    moved = part.weights if where == LENT else part.weights - part.around
    bandwidth = min(speed.link, speed.disk) if where == FROM_DISK else speed.link
    return times * moved / bandwidth


def _why(part: Part, where: str) -> str:
    if where == RESIDENT:
        return "fits"
    if where == LENT:
        return "runs once a picture, and others need the room"
    blocks = f"does not fit beside the others: blocks of up to {gib(part.block)}"
    return blocks if where == STREAMED else f"{blocks}, and host memory does not hold it"
