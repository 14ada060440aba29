"""A replica computes what the service does, and says when its model no longer does."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("ray")

from runners.clip import CLIPInferenceService
from runners.clip.serving.replica import Replica, deployment
from tests.runners.clip.serving.replicas import settings_for
from tests.tiny_clip import SIDE

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class BrokenTower(torch.nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the device is lost")


class Breakable(Replica):
    """Breaks where a test wants it."""

    def break_model(self) -> int:
        """The process id."""
        self.service.backend.images = BrokenTower()
        return os.getpid()

    def process(self) -> int:
        return os.getpid()


def values(count: int = 2) -> np.ndarray:
    """Pixel values as Ray brings them."""
    made = np.random.default_rng(0).standard_normal((count, 3, SIDE, SIDE)).astype(np.float32)
    made.setflags(write=False)
    return made


async def test_it_computes_what_the_service_does(clip_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    replica, service = Replica(settings_for(clip_dir)), CLIPInferenceService(str(clip_dir), "cpu")
    torch.set_warn_always(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pictures = await replica.pictures(values())
    torch.set_warn_always(False)
    features = service.backend.image_features(torch.tensor(values()))
    np.testing.assert_allclose(pictures, torch.nn.functional.normalize(features), atol=1e-6)
    with caplog.at_level(logging.WARNING, "runners"):
        texts = await replica.texts(["a", "long " * 100])
    assert "tokens of this text count" not in caplog.text, "the gateway says which texts are too long"
    np.testing.assert_allclose(texts, service.extract_text_features(["a", "long " * 100]), atol=1e-6)


async def test_a_model_that_fails_is_not_healthy_until_it_computes_again(clip_dir: Path) -> None:
    replica = Breakable(settings_for(clip_dir))
    await replica.check_health()
    well = replica.service.backend.images
    replica.break_model()
    await replica.check_health()  # of what has not failed nothing is asked
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the device is lost"):
            await replica.pictures(values())
        with pytest.raises(RuntimeError, match="the device is lost"):
            await replica.check_health()
    replica.service.backend.images = well
    await replica.check_health()
    assert not replica.has_failed


async def test_a_batch_that_fails_alone_does_not_make_it_ill(clip_dir: Path) -> None:
    replica = Replica(settings_for(clip_dir))
    with pytest.raises(RuntimeError):
        await replica.pictures(values()[:, :1])
    await replica.check_health()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_serve_replaces_a_replica_whose_model_fails(clip_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray import serve

    from runners.cli import sigterm_raises
    from runners.ray_local import quiet_ray, start_ray

    for name in ("TORCH_DEVICE_BACKEND_AUTOLOAD", "THP_MEM_ALLOC_ENABLE", "PYTHONPATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # which Ray's processes get
    quiet_ray()
    settings = settings_for(clip_dir)
    with sigterm_raises():  # which Ray takes over
        start_ray(ray, "cpu", 1)
        try:
            serve.start(http_options={"location": "NoServer"})
            handle: Any = serve.run(deployment(settings).options(func_or_class=Breakable).bind(settings))
            broken = handle.break_model.remote().result()
            while True:
                try:
                    features = handle.pictures.remote(values()).result()
                    break
                except Exception as error:  # of the model, then of the replica that is no more
                    print(error)
            assert handle.process.remote().result() != broken and features.shape == (2, 24)
        finally:
            ray.shutdown()
