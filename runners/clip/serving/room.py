"""Lets in what fits, for memory that several threads take from."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Room:
    """Holds `size` of anything at a time. Threads that ask for more than is free wait, in the order they came.

    It is the thread that counts, and not the request it works for: one that is given up computes on, and holds what
    it took until it ends.
    """

    def __init__(self, size: int) -> None:
        self.size = self.free = size
        self.turn = threading.Lock()  # else small ones would pass a large one for ever
        self.given_back = threading.Condition()

    @contextmanager
    def taken(self, amount: int) -> Iterator[None]:
        """Raises ValueError: more than there is in all."""
        if amount > self.size:
            raise ValueError(f"{amount} never fits into {self.size}")
        with self.turn, self.given_back:
            self.given_back.wait_for(lambda: amount <= self.free)
            self.free -= amount
        try:
            yield
        finally:
            with self.given_back:
                self.free += amount
                self.given_back.notify()
