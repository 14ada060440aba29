"""The model on one device, which computes what many requests want in one forward."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from ray import serve

from runners.clip.checkpoint import Scoring
from runners.clip.service import CLIPInferenceService
from runners.clip.serving.settings import Settings
from runners.devices import DTYPES

KEPT_TEXTS = 10_000  # whose features are remembered: labels come again and again


class Features(NamedTuple):
    """Of one input: `[width]` float32, of length 1; how many were computed together, 0 for a text that was known."""

    row: np.ndarray
    batch: int


class About(NamedTuple):
    """What the service needs to know of the model: where it computes, how long texts may be, how it scores."""

    device: str
    text_length: int
    takes_bytes: bool
    scoring: Scoring


class Replica:
    """Loads the model. Inputs that come while a forward computes are those of the next one."""

    def __init__(self, settings: Settings) -> None:
        if settings.kind == "cpu":
            torch.set_num_threads(settings.threads)
        self.service = CLIPInferenceService(
            settings.model,
            settings.kind,
            dtype=DTYPES[settings.dtype] if settings.dtype else None,
            backend=settings.backend,
            kernels=settings.kernels,
            compiled=settings.compiled,
        )
        self.known: OrderedDict[str, np.ndarray] = OrderedDict()
        batched: tuple[Any, ...] = (self.pictures, self.texts)
        for method in batched:
            method.set_max_batch_size(settings.batch_size)
            method.set_batch_wait_timeout_s(settings.wait_seconds if settings.batch_size > 1 else 0.0)

    def about(self) -> About:
        backend = self.service.backend
        return About(backend.device, backend.text_length, backend.takes_bytes, backend.scoring)

    @serve.batch
    async def pictures(self, values: list[np.ndarray]) -> list[Features]:
        """Of pixel values `[3, height, width]`, as the model's processor makes them."""
        rows = await asyncio.to_thread(self._pictures, values)
        return [Features(row, len(values)) for row in rows]

    def _pictures(self, values: Sequence[np.ndarray]) -> np.ndarray:
        features = self.service.backend.image_features(torch.from_numpy(np.stack(values)))
        return torch.nn.functional.normalize(features, dim=-1).cpu().numpy()

    @serve.batch
    async def texts(self, texts: list[str]) -> list[Features]:
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        if new:
            self.known.update(zip(new, await asyncio.to_thread(self._texts, new), strict=True))
        for text in texts:
            self.known.move_to_end(text)
        results = [Features(self.known[text], len(new) if text in new else 0) for text in texts]
        while len(self.known) > KEPT_TEXTS:
            self.known.popitem(last=False)
        return results

    def _texts(self, texts: list[str]) -> np.ndarray:
        return self.service.extract_text_features(texts).cpu().numpy()


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
        max_ongoing_requests=settings.pending,  # the gateway counts; Serve would try again at growing intervals
        health_check_period_s=2,
        health_check_timeout_s=30,
    )
