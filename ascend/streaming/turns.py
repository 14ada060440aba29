"""Calls that cannot be made at once, as they compute in the same memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple


class Holder(NamedTuple):
    name: str
    thread: int
    process: int


class Turns:
    """One call at a time."""

    def __init__(self) -> None:
        self.calls: dict[str, Holder] = {}  # that under way, if any

    def take(self, name: str, call: Callable[[], Any], end: Callable[[], None]) -> Any:
        """What `call` returns; `end` is called however it ends. `name` is of the model.

        Raises:
            RuntimeError: another call is under way, in this thread or in another.
        """
        mine = Holder(name, threading.get_ident(), os.getpid())
        try:
            # Asks and takes in one step: after a lock, an interrupt might come before it is known to be taken.
            holder = self.calls.setdefault("now", mine)
            if holder.process != mine.process:  # a call of a thread that has not come along to a forked process
                self.calls["now"] = mine
            elif holder is not mine:
                raise RuntimeError(f"{name} is called while {_where(holder, mine)} the same memory: {REMEDY}")
            try:
                return call()
            finally:
                end()
        finally:
            # No function is called before it is given up, after which an interrupt might come.
            if "now" in self.calls and self.calls["now"] is mine:
                del self.calls["now"]


REMEDY = (
    "a streamed or lent model, and all that share buffers, take one call at a time; give models that run at once "
    "buffers of their own, and each thread a model, or put a lock around the calls"
)


def _where(holder: Holder, mine: Holder) -> str:
    thread = "this thread" if holder.thread == mine.thread else "another thread"
    return f"{thread} computes {holder.name} in"
