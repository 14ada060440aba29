"""Torch's caching allocator, played through: what it takes from a device, with the sizes that its source names."""

from __future__ import annotations

import sys

from ascend.planner.allocator import MIB, Event, required_memory, reserved_by


def tape(*sizes: int) -> list[Event]:
    """Tensors that are made one after the other; -n frees the n-th."""
    count, events = 0, []
    for size in sizes:
        events.append(Event(count, size) if size > 0 else Event(-size - 1, None))
        count += size > 0
    return events


def reserved(*sizes: int) -> int:
    most = reserved_by(tape(*sizes), sys.maxsize)
    assert most is not None
    return most


def test_segments_have_the_sizes_of_the_allocators() -> None:
    assert reserved(1) == reserved(*[1000] * 1000) == 2 * MIB
    assert reserved(*[MIB - 32] * 2) == 2 * MIB and reserved(*[MIB - 32] * 3) == 4 * MIB
    assert reserved(MIB) == 20 * MIB  # with torch_npu's 32 bytes it is no small one any more
    assert reserved(MIB, 1) == 22 * MIB  # pools of their own
    assert reserved(10 * MIB) == 12 * MIB and reserved(11 * MIB, 3 * MIB) == (12 + 20) * MIB


def test_what_is_freed_is_used_again_and_joins_its_neighbours() -> None:
    six = 6 * MIB - 32
    assert reserved(six, six, six) == 20 * MIB
    assert reserved(six, six, six, -1, -3, 9 * MIB) == 40 * MIB  # a hole of 6 on one side, of 6 + 2 on the other
    assert reserved(six, six, six, -1, -2, 11 * MIB) == reserved(six, six, six, -2, -3, -1, 19 * MIB) == 20 * MIB
    assert reserved(9 * MIB, 30 * MIB, -2, 5 * MIB) == (20 + 30 + 2) * MIB


def test_a_full_device_gets_back_the_segments_that_are_free_as_a_whole() -> None:
    events = tape(40 * MIB - 32, -1, 50 * MIB - 32)
    assert reserved_by(events, sys.maxsize) == 90 * MIB
    assert reserved_by(events, 50 * MIB) == 50 * MIB and reserved_by(events, 50 * MIB - 1) is None
    kept = tape(40 * MIB - 32, -1, 5 * MIB, 50 * MIB - 32)  # a survivor in the first holds it
    assert reserved_by(kept, 90 * MIB - 1) is None
    assert required_memory(events, 20 * MIB, 90 * MIB) == 50 * MIB
