"""Where each model of a pipeline is while it waits, so that a picture is drawn soonest in the memory there is."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

from ascend.planner.activity import FROM_DISK, LENT, RESIDENT, STREAMED, Part, activity_of, buffer_of, in_order, total
from ascend.planner.allocator import required_memory, reserved_by
from ascend.streaming.buffers import BUFFERS

GIB, MIB = 2**30, 2**20
KEPT_SHARE = 0.95  # of the memory, up to which it is filled with blocks: what operators take inside is not seen


class Speed(NamedTuple):
    """Bytes a second from host memory to the device, and from disk to host memory."""

    link: float
    disk: float


STILL = Speed(1.0, 1.0)  # of weights that stay where they are


@dataclass(frozen=True)
class Placement:
    """Where one component is, and the seconds that its way to the device takes in a picture.

    Attributes:
        kept: the blocks that stay on the device where the others are streamed.
    """

    name: str
    where: str
    weights: int
    on_device: int
    seconds: float
    why: str
    kept: tuple[str, ...] = ()


@dataclass(frozen=True)
class MemoryPlan:
    """Attributes:
    placements: of each component.
    buffers: bytes of the two buffers that streamed blocks share.
    phases: bytes of tensors on the device in each phase, activations included.
    required: bytes of device memory with which it runs: tensors, and what the allocator cannot use around them.
    limit: bytes that there are.
    host: bytes of weights that stay in host memory.
    seconds_per_step: that weights are under way in a denoising step, if nothing is hidden behind computation.
    unknown: components of which it is not known what their calls take beside weights, and why.
    """

    placements: tuple[Placement, ...]
    buffers: int
    phases: dict[str, int]
    required: int
    limit: int
    host: int
    seconds_per_step: float
    unknown: dict[str, str]

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def is_resident(self) -> bool:
        return all(placement.where == RESIDENT for placement in self.placements)

    def where(self, name: str) -> str:
        """Of a component that the plan does not know, as one of another library, that it comes for its calls."""
        return next((placement.where for placement in self.placements if placement.name == name), LENT)

    def kept(self, name: str) -> tuple[str, ...]:
        """The blocks of a component that stay on the device where its others are streamed."""
        return next((placement.kept for placement in self.placements if placement.name == name), ())

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
        lines.append(f"peak {gib(self.peak)} ({phases}), buffers of {gib(self.buffers)} included")
        lines.append(f"runs with {gib(self.required)} of the device, and there are {gib(self.limit)}")
        lines += [
            f"{name}: what its calls take beside weights is not known, and not in the plan: {why}"
            for name, why in self.unknown.items()
        ]
        lines.append(f"weights are under way {self.seconds_per_step:.2f} s a step, less what computing hides")
        return "\n".join(lines)

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"peak": self.peak}, indent=2)


class PlanError(RuntimeError):
    """No placement fits; the message says what is missing and what would do."""


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"


def choose_plan(
    parts: list[Part],
    limit: int,
    host: int,
    steps: int,
    measure: Callable[[], Speed],
    allowed: tuple[str, ...] | None = None,
    keeps_blocks: bool = True,
) -> MemoryPlan:
    """The placement whose weights are under way for the shortest time, of those that fit.

    Args:
        parts: in the order in which they go to the device.
        limit: bytes of device memory for all of it.
        host: bytes of host memory for weights that are not on the device.
        steps: denoising steps of a picture.
        measure: says how fast weights travel; called if some have to.
        allowed: the ways in which a denoiser may be placed; all by default. Others may always leave the device.
        keeps_blocks: fill the memory that is left with blocks of streamed denoisers.

    Raises:
        PlanError: none fits.
    """
    everywhere = (RESIDENT,) * len(parts)
    choices = list(_choices(parts, allowed))
    if everywhere in choices:
        plan = _fitted(parts, everywhere, make_plan(parts, everywhere, limit, steps, STILL, allowed), host)
        if plan:
            return plan
        choices.remove(everywhere)
    if not choices:
        raise PlanError(f"no component of {', '.join(part.name for part in parts)} has blocks to stream")
    speed = measure()
    plans = [(make_plan(parts, choice, limit, steps, speed, allowed), choice) for choice in choices]
    plans.sort(key=lambda entry: (_seconds(parts, entry[0], entry[1], keeps=keeps_blocks), entry[0].peak))
    for plan, choice in plans:
        fitted = _fitted(parts, choice, plan, host)
        if fitted:
            return _keeping_blocks(parts, choice, fitted, host, steps, speed) if keeps_blocks else fitted
    plan, choice = min(plans, key=lambda entry: (entry[0].peak > limit, max(0, entry[0].host - host), entry[0].peak))
    raise PlanError(
        f"no placement fits: the smallest takes {gib(_required(parts, choice, plan))} of the device's {gib(limit)} "
        f"({', '.join(f'{p.name} {p.where}' for p in plan.placements)}) and {gib(plan.host)} of the "
        f"host's {gib(host)}; take smaller pictures, fewer at a time, a higher limit if there is one, or a chip with "
        "more memory"
    )


def _seconds(parts: list[Part], plan: MemoryPlan, choice: tuple[str, ...], keeps: bool) -> float:
    """That weights are under way for a picture; about those where blocks of denoisers fill the memory that is left."""
    room = KEPT_SHARE * plan.limit - plan.peak if keeps else 0.0
    seconds = 0.0
    for part, where, placement in zip(parts, choice, plan.placements, strict=True):
        if part.may_keep(where):
            blocks = [sum(block.values()) for block in part.weights.blocks.values()]
            stays = min(max(room, 0.0), sum(blocks) - min(blocks))  # one travels, or it would not be streamed
            room -= stays
            seconds += placement.seconds * (1 - stays / sum(blocks))
        else:
            seconds += placement.seconds
    return seconds


def _keeping_blocks(
    parts: list[Part], choice: tuple[str, ...], plan: MemoryPlan, host: int, steps: int, speed: Speed
) -> MemoryPlan:
    """The plan, with as many blocks of streamed denoisers on the device as there is room for."""
    limit = int(KEPT_SHARE * plan.limit)
    for place, where in enumerate(choice):
        part = parts[place]
        if not part.may_keep(where):
            continue
        fits, too_many = 0, len(part.weights.blocks)
        while too_many - fits > 1:
            number = (fits + too_many) // 2
            trial = [*parts[:place], part.keeping(number), *parts[place + 1 :]]
            fitted = _fitted(trial, choice, make_plan(trial, choice, limit, steps, speed), host)
            if fitted:
                fits, parts, plan = number, trial, replace(fitted, limit=plan.limit)
            else:
                too_many = number
    return plan


def _fitted(parts: list[Part], choice: tuple[str, ...], plan: MemoryPlan, host: int) -> MemoryPlan | None:
    """The plan with what it requires, if there is so much."""
    if plan.peak > plan.limit or plan.host > host:
        return None  # without the allocator's help
    reserved = reserved_by(activity_of(parts, choice), plan.limit)
    return replace(plan, required=_required(parts, choice, plan, reserved)) if reserved is not None else None


def _required(parts: list[Part], choice: tuple[str, ...], plan: MemoryPlan, enough: int | None = None) -> int:
    activity = activity_of(parts, choice)
    if enough is None:
        enough = reserved_by(activity, sys.maxsize)
        assert enough is not None  # of a device without a limit
    return required_memory(activity, plan.peak, enough)


def _choices(parts: list[Part], allowed: tuple[str, ...] | None) -> Iterator[tuple[str, ...]]:
    everything = (RESIDENT, LENT, STREAMED, FROM_DISK)
    for choice in itertools.product(everything, repeat=len(parts)):
        pairs = list(zip(parts, choice, strict=True))
        if any(where in (STREAMED, FROM_DISK) and not part.weights.block for part, where in pairs):
            continue
        if any(where == FROM_DISK and part.casts for part, where in pairs):
            continue  # what was cast is in no file
        if any(part.denoises and where == LENT for part, where in pairs):
            continue  # streaming is never worse
        if allowed and any(part.denoises and where not in allowed for part, where in pairs):
            continue
        yield choice


def make_plan(
    parts: list[Part],
    choice: tuple[str, ...],
    limit: int,
    steps: int,
    speed: Speed,
    allowed: tuple[str, ...] | None = None,
) -> MemoryPlan:
    """What a placement of `parts` takes; what it requires is left open."""
    pairs = list(zip(parts, choice, strict=True))
    buffers = BUFFERS * total(buffer_of(pairs).values())
    placements = []
    for part, where in pairs:
        why = _why(part, where, bool(allowed) and part.denoises)
        seconds = seconds_under_way(part, where, steps, speed)
        on_device = total(part.weights.on_device(where)) + max(part.growth(run, where) for run in part.runs)
        placements.append(
            Placement(part.name, where, total(part.weights.tensors), on_device, seconds, why, part.weights.kept)
        )
    always = buffers + sum(total(part.weights.on_device(where)) for part, where in pairs)
    phases: dict[str, int] = {}
    for phase, runs in in_order(pairs):
        always += sum(total(run.inputs) for _, _, run in runs)
        phases[phase] = always + max(part.growth(run, where) + run.peak for part, where, run in runs)
    return MemoryPlan(
        tuple(placements),
        buffers,
        phases,
        0,
        limit,
        sum(
            max(total(weights.tensors) for weights in (part.weights, *part.casts))
            for part, where in pairs
            if where in (LENT, STREAMED)
        ),
        sum(p.seconds / steps for p, part in zip(placements, parts, strict=True) if part.denoises),
        {part.name: part.unknown for part in parts if part.unknown},
    )


def seconds_under_way(part: Part, where: str, steps: int, speed: Speed) -> float:
    """Of the weights of one picture on their way to the device."""
    if where == RESIDENT:
        return 0.0
    bandwidth = min(speed.link, speed.disk) if where == FROM_DISK else speed.link
    moved = 0
    for run in part.runs:
        times = steps if run.phase == "denoise" else 1
        blocks = sum(size for name, size in run.streamed.items() if name not in part.weights.kept)
        moved += times * (total(run.loan) if where == LENT else blocks)
    return moved / bandwidth


def _why(part: Part, where: str, asked: bool) -> str:
    if where == RESIDENT:
        return "as asked" if asked else "fits"
    if where == LENT:
        return "runs once a picture, and others need the room"
    blocks = f"blocks of up to {gib(total(part.weights.block.values()))}"
    if asked:
        return f"as asked: {blocks}"
    if part.weights.kept:
        blocks += f", and {len(part.weights.kept)} stay there"
    return f"does not fit beside the others{', nor in host memory' if where == FROM_DISK else ''}: {blocks}"
