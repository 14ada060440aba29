from pathlib import Path

import pytest

from scripts.fork import fork_wheel


@pytest.fixture(scope="session")
def upstream_wheel() -> Path:
    """The wheel that the patches are for, which building the fork has left in the cache."""
    return fork_wheel.upstream_wheel(fork_wheel.read_pin())
