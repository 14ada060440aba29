"""The service's HTTP side: it reads requests, refuses what it cannot do, and asks the replicas for the rest."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

from runners.clip.checkpoint import load_processor
from runners.clip.inputs import prepare_pictures, prepare_texts
from runners.clip.serving.batches import Batches
from runners.clip.serving.protocol import (
    EmbeddingsRequest,
    Refusal,
    ZeroShotRequest,
    embeddings_answer,
    parse,
    zero_shot_answer,
)
from runners.clip.serving.replica import About
from runners.clip.serving.settings import Settings

logger = logging.getLogger(__name__)
LOST = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError)  # a replica that is no more
ATTEMPTS = 5  # for a batch: a replica that is lost takes nothing with it
BATCHES = 2  # of each replica
HEALTH_SECONDS = 5.0
KEPT_TEXTS = 10_000
RETRY_SECONDS = 0.5


class Metrics:
    """What Prometheus reads of the gateway, through which everything passes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        into: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("clip_requests", "Requests answered.", ["endpoint", "status"], **into)
        self.seconds = Histogram("clip_request_seconds", "From a request's head to its answer.", ["endpoint"], **into)
        self.pending = Gauge("clip_pending_inputs", "Texts and pictures that wait or are computed.", **into)
        sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256]
        self.batch = Histogram("clip_batch_inputs", "Inputs of a forward.", buckets=sizes, **into)
        self.retries = Counter("clip_retries", "Batches that were computed again, as a replica was lost.", **into)


class Gateway:
    """One for all replicas. It prepares pictures in threads, and puts what comes at a time together for one forward.

    While the replicas compute, the next batches fill: each replica has two, one that it computes and one that waits.

    Args:
        model: Ray Serve's handle of the replicas.
    """

    def __init__(self, model: Any, settings: Settings) -> None:
        self.model, self.settings, self.metrics = model, settings, Metrics()
        self.name = Path(settings.model).name
        self.processor = load_processor(settings.model)
        self.about: About | None = None
        self.pending = 0
        self.known: OrderedDict[str, np.ndarray] = OrderedDict()  # features of texts: labels come again and again
        how = settings.batch_size, settings.wait_seconds, BATCHES * settings.replicas
        self._texts: Batches[str, np.ndarray] = Batches(self._compute_texts, *how)
        self._pictures: Batches[np.ndarray, np.ndarray] = Batches(self._compute_pictures, *how)

    def app(self) -> FastAPI:
        app = FastAPI(title="CLIP", redoc_url=None)
        app.post("/v1/embeddings")(self.embeddings)
        app.post("/v1/zero-shot-image-classification")(self.zero_shot)
        app.get("/v1/models")(self.models)
        app.get("/metrics")(self.scraped)
        app.get("/health")(self.health)
        return app

    async def embeddings(self, request: Request) -> Response:
        async def answer() -> Any:
            asked = parse(EmbeddingsRequest, await self._body(request))
            self._check_model(asked.model)
            self._check_number(len(asked.input))
            inputs = await asyncio.to_thread(asked.contents)
            about = await self._about()
            rows = await self._features(inputs, about)
            return embeddings_answer(rows, asked, self.name, self._truncated(inputs, about))

        return await self._answered("embeddings", request, answer)

    async def zero_shot(self, request: Request) -> Response:
        async def answer() -> Any:
            asked = parse(ZeroShotRequest, await self._body(request))
            self._check_model(asked.model)
            self._check_number(1 + len(asked.parameters.candidate_labels))
            inputs: list[str | Image.Image] = [await asyncio.to_thread(asked.picture), *asked.texts()]
            about = await self._about()
            picture, *texts = (torch.from_numpy(row) for row in await self._features(inputs, about))
            shares = about.scoring.probabilities(about.scoring.logits(picture[None], torch.stack(texts)))[0]
            return zero_shot_answer(asked.parameters.candidate_labels, shares.tolist())

        return await self._answered("zero-shot", request, answer)

    async def models(self, request: Request) -> Response:
        async def answer() -> Any:
            return {"object": "list", "data": [{"id": self.name, "object": "model", "owned_by": "local"}]}

        return await self._answered("models", request, answer)

    async def scraped(self, request: Request) -> Response:
        self.metrics.pending.set(self.pending)
        try:
            self._check_token(request)
        except Refusal as refusal:
            return JSONResponse(refusal.body(), refusal.status)
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def health(self) -> Response:
        """200 if a replica answers, 503 otherwise. Needs no token."""
        state = {"model": self.name, "pending": self.pending}
        try:
            about: About = await asyncio.wait_for(self.model.about.remote(), HEALTH_SECONDS)
        except (TimeoutError, RayError, *LOST):
            return JSONResponse({"status": "no replica answers", **state}, 503)
        return JSONResponse({"status": "ok", "device": about.device, **state})

    async def _answered(self, endpoint: str, request: Request, answer: Callable[[], Awaitable[Any]]) -> Response:
        start = time.perf_counter()
        status, content = 500, None  # of what nobody expects
        try:
            content = await self._in_time(request, answer)
            status = 200
        except Refusal as refusal:
            status, content = refusal.status, refusal.body()
        finally:
            self.metrics.requests.labels(endpoint, status).inc()
            self.metrics.seconds.labels(endpoint).observe(time.perf_counter() - start)
        return JSONResponse(content, status, {"Retry-After": "1"} if status == 429 else None)

    async def _in_time(self, request: Request, answer: Callable[[], Awaitable[Any]]) -> Any:
        """Raises Refusal: also where it takes too long, or the model fails."""
        self._check_token(request)
        try:
            return await asyncio.wait_for(answer(), self.settings.timeout_seconds)
        except TimeoutError as error:
            raise Refusal(504, "timeout", f"not done within {self.settings.timeout_seconds:g} s") from error
        except (RayError, *LOST) as error:
            logger.exception("a request failed")
            reason = f"the model failed: {type(error).__name__}; the service's log has more"
            raise Refusal(500, "internal", reason) from error

    def _check_token(self, request: Request) -> None:
        token = self.settings.token
        if token is None:
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise Refusal(401, "unauthorized", "the header 'Authorization: Bearer TOKEN' is missing or another's")

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise Refusal(404, "model_not_found", f"there is no model '{name}' here, but '{self.name}'")

    def _check_number(self, inputs: int) -> None:
        """Before pictures are decoded."""
        if inputs > self.settings.inputs:
            raise Refusal(413, "too_many", f"a request has at most {self.settings.inputs} inputs, not {inputs}")

    async def _body(self, request: Request) -> bytes:
        limit, body = self.settings.body_bytes, bytearray()
        too_large = Refusal(413, "too_large", f"a request has at most {limit} bytes")
        if int(request.headers.get("content-length") or 0) > limit:
            raise too_large
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_large
        return bytes(body)

    async def _about(self) -> About:
        if self.about is None:
            self.about = await self.model.about.remote()
        return self.about

    def _truncated(self, inputs: Sequence[str | Image.Image], about: About) -> list[int]:
        """Which inputs are texts that lose their end."""
        texts = [each for each in inputs if isinstance(each, str)]
        truncated = prepare_texts(self.processor, texts, about.text_length, False).truncated if texts else []
        return [place for place, each in enumerate(inputs) if isinstance(each, str) and each in truncated]

    async def _features(self, inputs: Sequence[str | Image.Image], about: About) -> list[np.ndarray]:
        async with self._admitted(len(inputs)):
            tasks = [asyncio.ensure_future(self._feature(each, about)) for each in inputs]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

    @asynccontextmanager
    async def _admitted(self, number: int) -> AsyncIterator[None]:
        """Raises Refusal: as many as may be are waiting already, so that a queue never outgrows its time-out."""
        if self.pending and self.pending + number > self.settings.pending:
            raise Refusal(429, "busy", f"{self.pending} inputs are waiting: ask again later")
        self.pending += number
        try:
            yield
        finally:
            self.pending -= number

    async def _feature(self, given: str | Image.Image, about: About) -> np.ndarray:
        """`[width]` float32, of length 1."""
        if not isinstance(given, str):
            values = await asyncio.to_thread(prepare_pictures, self.processor, [given], about.takes_bytes)
            return await self._pictures(values[0].numpy())
        if given not in self.known:
            self.known[given] = await self._texts(given)
        self.known.move_to_end(given)
        row = self.known[given]
        while len(self.known) > KEPT_TEXTS:
            self.known.popitem(last=False)
        return row

    async def _compute_texts(self, texts: list[str]) -> list[np.ndarray]:
        return await self._compute("texts", texts)

    async def _compute_pictures(self, values: list[np.ndarray]) -> list[np.ndarray]:
        return await self._compute("pictures", np.stack(values))

    async def _compute(self, method: str, batch: Any) -> list[np.ndarray]:
        self.metrics.batch.observe(len(batch))
        for _ in range(ATTEMPTS - 1):
            try:
                return list(await getattr(self.model, method).remote(batch))
            except LOST:
                self.metrics.retries.inc()
                await asyncio.sleep(RETRY_SECONDS)
        return list(await getattr(self.model, method).remote(batch))
