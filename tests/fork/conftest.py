from pathlib import Path

import fork
import pytest


@pytest.fixture(scope="session")
def upstream_wheel() -> Path:
    """The wheel that the patches are for, which building the fork has left in the cache."""
    return fork.upstream_wheel(fork.read_pin())
