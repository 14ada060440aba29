from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tiny_clip import save_tiny_clip, save_tiny_siglip


@pytest.fixture(scope="session")
def clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="session")
def siglip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_siglip(tmp_path_factory.mktemp("models") / "siglip")


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Seven that a random model tells apart."""
    return [
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)).resize((50, 60))
        for seed in range(7)
    ]
