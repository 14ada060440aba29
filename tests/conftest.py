from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from tests.chat_server import Endpoint, chat_server
from tests.tiny_models import save_tiny_sd, small_unet


@pytest.fixture(scope="session")
def tiny_sd_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a saved, randomly initialised SD pipeline. Read only: copy it before you change it."""
    return save_tiny_sd(tmp_path_factory.mktemp("models") / "tiny_sd")


@pytest.fixture(scope="session")
def small_sd_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a UNet of two levels, which compiles in a fraction of the time. Read only."""
    return save_tiny_sd(tmp_path_factory.mktemp("models") / "small_sd", make_unet=small_unet)


@pytest.fixture
def tiny_sd(tiny_sd_dir: Path) -> StableDiffusionPipeline:
    """A fresh pipeline from `tiny_sd_dir`, on the CPU in float32, in evaluation mode, without a progress bar."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd_dir, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def small_sd(small_sd_dir: Path) -> StableDiffusionPipeline:
    """A fresh pipeline from `small_sd_dir`, else as `tiny_sd`."""
    pipe = StableDiffusionPipeline.from_pretrained(small_sd_dir, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """What OPENAI_BASE_URL and OPENAI_API_KEY name."""
    with chat_server() as made:
        monkeypatch.setenv("OPENAI_BASE_URL", made.url)
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        yield made
