"""What is held at a time, and who comes next."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from runners.clip.serving.room import Room


class Holder:
    """A thread that takes `amount` as soon as it can, and gives it back when it is told to."""

    def __init__(self, threads: ThreadPoolExecutor, room: Room, amount: int) -> None:
        self.has, self.end = threading.Event(), threading.Event()
        self.done: Future[None] = threads.submit(self._hold, room, amount)

    def _hold(self, room: Room, amount: int) -> None:
        with room.taken(amount):
            self.has.set()
            assert self.end.wait(60)

    def give_back(self) -> None:
        self.end.set()
        self.done.result(60)


def test_a_large_one_waits_for_room_and_small_ones_do_not_pass_it() -> None:
    with ThreadPoolExecutor(4) as threads:
        room = Room(10)
        first, second = Holder(threads, room, 4), Holder(threads, room, 3)
        assert first.has.wait(60) and second.has.wait(60)
        large = Holder(threads, room, 8)
        while not room.turn.locked():
            pass
        small = Holder(threads, room, 1)
        first.give_back()
        assert not large.has.wait(0.1) and not small.has.is_set(), "8 do not fit beside 3, and 1 came later"
        second.give_back()
        assert large.has.wait(60) and small.has.wait(60)
        large.give_back()
        small.give_back()
        assert room.free == 10


def test_room_comes_back_from_who_fails() -> None:
    room = Room(5)
    with pytest.raises(KeyError), room.taken(5):
        raise KeyError
    with room.taken(5):
        assert room.free == 0
    with pytest.raises(ValueError, match="6 never fits into 5"), room.taken(6):
        pass
