"""How much a device needs for tensors that come and go: torch's caching allocator, played through without a device.

The allocators of CUDA and torch_npu take segments from the device, cut tensors out of them and keep what is freed, so
that a device needs more than its tensors take. What they do is in c10/cuda/CUDACachingAllocator.cpp of torch and in
torch_npu/csrc/core/npu/NPUCachingAllocator.cpp of torch_npu; this is their behaviour by default, on one stream.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import NamedTuple

MIB = 2**20
GRAIN = 512  # bytes: blocks are multiples of it
PADDING = 32  # bytes that torch_npu adds to each request, as CANN's operators read ahead
SMALL = MIB  # requests up to this size have segments of their own kind
SMALL_SEGMENT, LARGE_SEGMENT = 2 * MIB, 20 * MIB
OWN_SEGMENT = 10 * MIB  # requests from this size on get segments that fit them
ROUND = 2 * MIB  # which these are multiples of


class Event(NamedTuple):
    """A tensor, known by `number`, of `size` bytes is made, or one that was made goes (None)."""

    number: int
    size: int | None


class OutOfMemoryError(Exception):
    """The device has no room for a segment, whatever is given back."""


class Block:
    """A piece of a segment, between its neighbours there."""

    __slots__ = ("address", "before", "behind", "is_free", "size")

    def __init__(self, address: int, size: int, before: Block | None = None, behind: Block | None = None) -> None:
        self.address, self.size, self.before, self.behind, self.is_free = address, size, before, behind, False


class Allocator:
    """Of a device with `limit` bytes.

    Attributes:
        reserved: bytes of all segments now.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.reserved = self.end = 0
        # Free blocks by size, then by address: the smallest that is large enough is taken.
        self.pools: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}

    def allocate(self, size: int) -> Block:
        """Raises OutOfMemoryError."""
        size = rounded(size)
        is_small = size <= SMALL
        pool = self.pools[is_small]
        position = bisect_left(pool, (size,))
        block = pool.pop(position)[2] if position < len(pool) else self._new_segment(size)
        block.is_free = False
        left = block.size - size
        if left >= GRAIN if is_small else left > SMALL:
            rest = Block(block.address + size, left, block, block.behind)
            if block.behind:
                block.behind.before = rest
            block.behind, block.size = rest, size
            self._keep(rest, is_small)
        return block

    def free(self, block: Block, is_small: bool) -> None:
        """Give back a block of `allocate`, which joins its free neighbours."""
        for other in (block.before, block.behind):
            if other and other.is_free:
                pool = self.pools[is_small]
                del pool[bisect_left(pool, (other.size, other.address))]
                block.address = min(block.address, other.address)
                block.size += other.size
                if other is block.before:
                    block.before = other.before
                else:
                    block.behind = other.behind
        if block.before:
            block.before.behind = block
        if block.behind:
            block.behind.before = block
        self._keep(block, is_small)

    def _keep(self, block: Block, is_small: bool) -> None:
        block.is_free = True
        insort(self.pools[is_small], (block.size, block.address, block))

    def _new_segment(self, size: int) -> Block:
        if size <= SMALL:
            segment = SMALL_SEGMENT
        else:
            segment = LARGE_SEGMENT if size < OWN_SEGMENT else -(-size // ROUND) * ROUND
        if self.reserved + segment > self.limit:
            self._give_back()
            if self.reserved + segment > self.limit:
                raise OutOfMemoryError
        self.reserved += segment
        self.end += segment
        return Block(self.end - segment, segment)

    def _give_back(self) -> None:
        """All segments of which nothing is in use go."""
        for is_small, pool in self.pools.items():
            self.reserved -= sum(size for size, _, block in pool if not (block.before or block.behind))
            self.pools[is_small] = [entry for entry in pool if entry[2].before or entry[2].behind]


def rounded(size: int) -> int:
    return -(-(size + PADDING) // GRAIN) * GRAIN


def reserved_by(events: Iterable[Event], limit: int) -> int | None:
    """The most bytes that are in segments while these tensors come and go; None if `limit` bytes are too few."""
    allocator, most = Allocator(limit), 0
    blocks: dict[int, tuple[Block, bool]] = {}
    try:
        for number, size in events:
            if size is None:
                allocator.free(*blocks.pop(number))
            else:
                blocks[number] = allocator.allocate(size), rounded(size) <= SMALL
                most = max(most, allocator.reserved)
    except OutOfMemoryError:
        return None
    return most


def required_memory(events: list[Event], least: int, enough: int) -> int:
    """The smallest limit of at least `least` bytes with which `events` run, to a MiB; they do with `enough`."""
    low, high = least, enough
    while high - low > MIB:
        middle = (low + high) // 2
        reserved = reserved_by(events, middle)
        if reserved is None:
            low = middle
        else:
            high = reserved
    return high
