"""Which block a model calls next."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch.utils import _pytree as pytree

from ascend.streaming.host_copy import HostCopy


def kind_of_call(args: Any, kwargs: Any) -> Hashable:
    """Which arguments there are, and of which types.

    That decides which blocks run in the models that we know: a shallow step of DeepCache has a feature where a full
    one has None. Values have no part in it, as a timestep may be one.
    """
    leaves, structure = pytree.tree_flatten((args, kwargs))
    return structure, tuple(map(type, leaves))


class Orders:
    """The blocks of each kind of call in the order of its last one; a new kind is guessed from the call before it.

    Calls of one block that follow each other count as one.
    """

    def __init__(self, blocks: Sequence[HostCopy]) -> None:
        """The first guess is `blocks` in their order."""
        self.latest = list(blocks)
        self.of_kinds: dict[Hashable, list[HostCopy]] = {}
        self.begin(None)

    def begin(self, kind: Hashable) -> HostCopy:
        """Of a call; the block that will probably be the first."""
        self.kind = kind
        self.expected = self.of_kinds.get(kind, self.latest)
        self.position = -1  # in `expected`
        self.called: list[HostCopy] = []
        return self.expected[0]

    def go_on(self, block: HostCopy) -> HostCopy | None:
        """To `block`; the one that will probably follow, if any."""
        self.called.append(block)
        if block in self.expected[self.position + 1 :]:
            self.position = self.expected.index(block, self.position + 1)
        elif block in self.expected:
            self.position = self.expected.index(block)
        else:
            return None
        return self.expected[self.position + 1] if self.position + 1 < len(self.expected) else None

    def end(self) -> None:
        """Of a call that came to its end."""
        if self.called:
            self.latest = self.of_kinds[self.kind] = self.called
