"""What keeps a kernel from a call: a row of data with reason and source."""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

Call = TypeVar("Call")  # all that the choice of a kernel depends on


class Limit(NamedTuple, Generic[Call]):
    """One condition of a kernel: `allows(call)` is false where the kernel fails or gives a wrong result."""

    reason: str
    source: str
    allows: Callable[[Call], bool]
