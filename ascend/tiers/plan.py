"""Which tensors go down to make room for another, worked out before any of them moves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Resident(NamedTuple):
    """A tensor where it is now.

    Attributes:
        rank: its priority, and when it was used last: the least goes down first.
        key: its name in the store.
        sizes: the bytes it takes in each tier.
    """

    rank: tuple[float, int]
    key: str
    sizes: Sequence[int]


class Plan:
    """Demotions, in an order in which no tier is ever over its budget.

    Args:
        free: bytes that each tier has left, the fastest tier first.
        residents: what may go down, by tier.
    """

    def __init__(self, free: Sequence[int], residents: Sequence[Iterable[Resident]]) -> None:
        self.moves: list[tuple[Resident, int, int]] = []  # which, from where, to where
        self._free = list(free)
        self._residents = [set(tier) for tier in residents]

    def make_room(self, size: int, level: int) -> bool:
        """Add the moves after which tier `level` has `size` bytes free. False: there are none."""
        smallest_stuck: float = float("inf")  # what is not smaller than one that cannot go down cannot either
        for resident in sorted(self._residents[level]):
            if self._free[level] >= size:
                break
            if max(resident.sizes) < smallest_stuck and not self._push_down(resident, level):
                smallest_stuck = max(resident.sizes)
        return self._free[level] >= size

    def _push_down(self, resident: Resident, level: int) -> bool:
        for lower in range(level + 1, len(self._free)):
            mark = len(self.moves)
            if self.make_room(resident.sizes[lower], lower):
                self._move(resident, level, lower)
                self.moves.append((resident, level, lower))
                return True
            while len(self.moves) > mark:
                undone, source, target = self.moves.pop()
                self._move(undone, target, source)
        return False

    def _move(self, resident: Resident, source: int, target: int) -> None:
        self._free[source] += resident.sizes[source]
        self._free[target] -= resident.sizes[target]
        self._residents[source].remove(resident)
        self._residents[target].add(resident)
