"""What a session of an offline model holds goes in an order that no chip shows: after the run, in its context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ascend.acl import OmError
from ascend.om import Held


class Calls(list):
    """Notes what a session asks of CANN."""

    @contextmanager
    def in_context(self, context: int) -> Iterator[None]:
        self.append(f"context {context}")
        yield
        self.append("own context")

    def aclrtSynchronizeStream(self, stream: int) -> None:
        self.append(f"wait for {stream}")
        if stream == 0:
            raise OmError("a stream that is no more")


def held(calls: Calls, stream: int | None) -> Held:
    held = Held(calls, "tower.om")
    held.context, held.stream = 5, stream
    held.stack.callback(calls.append, "free")
    return held


def test_what_a_run_uses_is_freed_when_it_is_done() -> None:
    calls = Calls()
    held(calls, stream=7).free()
    assert calls == ["context 5", "wait for 7", "free", "own context"]


def test_a_stream_that_is_gone_keeps_no_memory() -> None:
    calls = Calls()
    with pytest.raises(OmError, match="no more"):
        held(calls, stream=0).free()
    assert calls[:3] == ["context 5", "wait for 0", "free"]


def test_nothing_is_waited_for_without_a_run() -> None:
    calls = Calls()
    with pytest.warns(ResourceWarning, match="the offline model tower.om was not closed"):
        held(calls, stream=None).free_unclosed()
    assert calls == ["context 5", "free", "own context"]
