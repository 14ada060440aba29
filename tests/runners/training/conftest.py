from pathlib import Path

import pytest

from tests.training_work import train, write_pictures


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six captioned pictures; their latents are cached beside them. Read only."""
    return write_pictures(tmp_path_factory.mktemp("training") / "pictures")


@pytest.fixture(scope="session")
def trained_dir(pictures: Path, small_sd_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What six undisturbed steps leave, with an average of the weights. Read only."""
    return train(pictures, small_sd_dir, tmp_path_factory.mktemp("training") / "undisturbed")
