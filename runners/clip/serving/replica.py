"""The model on one device, which computes what the gateway has put together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from ray import serve
from torch import Tensor

from runners.clip.checkpoint import Scoring
from runners.clip.inputs import prepare_texts
from runners.clip.service import CLIPInferenceService
from runners.clip.serving.settings import Settings
from runners.devices import DTYPES

PROBE = (Image.new("RGB", (8, 8)), "a text")
Result = TypeVar("Result")


class About(NamedTuple):
    """What the service needs to know of the model: where it computes, how long texts may be, how it scores."""

    device: str
    text_length: int
    takes_bytes: bool
    scoring: Scoring


class Replica:
    """Loads the model, and computes in one thread, beside which its process hears the next calls."""

    def __init__(self, settings: Settings) -> None:
        if settings.kind == "cpu":
            torch.set_num_threads(settings.threads)
        self.thread = ThreadPoolExecutor(1)  # a device and a session compute one thing at a time
        self.has_failed = False  # since a health check found the model well
        self.service = CLIPInferenceService(
            settings.model,
            settings.kind,
            dtype=DTYPES[settings.dtype] if settings.dtype else None,
            backend=settings.backend,
            kernels=settings.kernels,
            compiled=settings.compiled,
        )

    async def _in_turn(self, compute: Callable[[Any], Result], batch: Any) -> Result:
        try:
            return await asyncio.get_running_loop().run_in_executor(self.thread, compute, batch)
        except Exception:
            self.has_failed = True
            raise

    async def check_health(self) -> None:
        """Ray Serve asks for it, and replaces a replica where it raises three times in turn.

        What a batch failed by may have been the batch: after a failure the model has to compute something known.
        """
        if self.has_failed:
            await self._in_turn(self._predict, PROBE)
            self.has_failed = False

    def about(self) -> About:
        backend = self.service.backend
        return About(backend.device, backend.text_length, backend.takes_bytes, backend.scoring)

    async def pictures(self, values: np.ndarray) -> np.ndarray:
        """`[count, width]` float32 of length 1, of pixel values as the model's processor makes them."""
        return await self._in_turn(self._pictures, values)

    def _pictures(self, values: np.ndarray) -> np.ndarray:
        own = torch.tensor(values)  # Ray's cannot be written to, of which torch warns where it takes them as they are
        return _normalized(self.service.backend.image_features(own))

    async def texts(self, texts: list[str]) -> np.ndarray:
        """As `pictures`."""
        return await self._in_turn(self._texts, texts)

    def _texts(self, texts: list[str]) -> np.ndarray:
        backend = self.service.backend
        tokens = prepare_texts(self.service.processor, texts, backend.text_length, backend.pads_texts)
        return _normalized(backend.text_features(tokens.input_ids))

    def _predict(self, pair: tuple[Image.Image, str]) -> None:
        image, text = pair
        self.service.predict(image, [text])


def _normalized(features: Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(features, dim=-1).cpu().numpy()


def deployment(settings: Settings) -> Any:
    """As Ray Serve runs it: a replica on each device."""
    resources: dict[str, dict[str, Any]] = {
        "npu": {"num_cpus": 0, "resources": {"NPU": 1}},
        "cuda": {"num_cpus": 0, "num_gpus": 1},
        "cpu": {"num_cpus": 1},
    }
    deployed: Any = serve.deployment(Replica)
    return deployed.options(
        name="model",
        num_replicas=settings.replicas,
        ray_actor_options=resources[settings.kind],
        max_ongoing_requests=settings.pending,  # never reached: the gateway sends two batches a replica
        health_check_period_s=2,
        health_check_timeout_s=30,
    )
