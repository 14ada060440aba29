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
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from starlette.requests import ClientDisconnect

from runners.clip.checkpoint import load_processor
from runners.clip.inputs import prepare_pictures, prepare_texts
from runners.clip.serving.batches import Batches
from runners.clip.serving.protocol import (
    EmbeddingsRequest,
    Refusal,
    SentPicture,
    ZeroShotRequest,
    embeddings_answer,
    parse,
    zero_shot_answer,
)
from runners.clip.serving.replica import About
from runners.clip.serving.room import Room
from runners.clip.serving.settings import Settings

logger = logging.getLogger(__name__)
LOST = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError)  # a replica that is no more
ATTEMPTS = 5  # for a batch: a replica that is lost takes nothing with it
BATCHES = 2  # of each replica
CLIENT_GONE = 499  # in the metrics alone, as nginx has it: nobody is there to read an answer
ENDING_SECONDS = 15.0  # that a service which ends gives its replicas to answer
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
        self.decoding = Room(settings.pixels)  # of all requests, as each may have so many
        self.ends_without_replica = False
        self.waits: set[asyncio.Timeout] = set()  # of the requests that are being answered
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
            async with self._admitted(len(asked.input)):
                inputs, about = await asyncio.to_thread(asked.contents), await self._about()
                rows = await self._features(inputs, about)
                truncated = await asyncio.to_thread(self._truncated, inputs, about)
            return embeddings_answer(rows, asked, self.name, truncated)

        return await self._answered("embeddings", request, answer)

    async def zero_shot(self, request: Request) -> Response:
        async def answer() -> Any:
            asked = parse(ZeroShotRequest, await self._body(request))
            self._check_model(asked.model)
            labels = asked.parameters.candidate_labels
            async with self._admitted(1 + len(labels)):
                inputs, about = await asyncio.to_thread(asked.contents), await self._about()
                rows = torch.from_numpy(np.stack(await self._features(inputs, about)))
            shares = about.scoring.probabilities(about.scoring.logits(rows[:1], rows[1:]))[0]
            return zero_shot_answer(labels, shares.tolist())

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
        about = await self._about_within(HEALTH_SECONDS)
        if about is None:
            return JSONResponse({"status": "no replica answers", **state}, 503)
        return JSONResponse({"status": "ok", "device": about.device, **state})

    async def _about_within(self, seconds: float) -> About | None:
        """None: there is none within that time."""
        try:
            return await asyncio.wait_for(self.model.about.remote(), seconds)
        except (TimeoutError, RayError, *LOST):
            return None

    async def refuse_without_replica(self) -> None:
        """Refuse what is being answered as soon as no replica answers; before that, never return.

        For a service that ends: else it would wait for replicas that are lost for good as long as requests may.
        """
        while await self._about_within(ENDING_SECONDS):
            await asyncio.sleep(1)
        self.ends_without_replica = True
        for wait in self.waits:
            if not wait.expired():
                wait.reschedule(asyncio.get_running_loop().time())

    async def _answered(self, endpoint: str, request: Request, answer: Callable[[], Awaitable[Any]]) -> Response:
        start = time.perf_counter()
        status, content = 500, None  # of what nobody expects
        try:
            content = await self._in_time(request, answer)
            status = 200
        except Refusal as refusal:
            status, content = refusal.status, refusal.body()
        except ClientDisconnect:
            status = CLIENT_GONE
        finally:
            self.metrics.requests.labels(endpoint, status).inc()
            self.metrics.seconds.labels(endpoint).observe(time.perf_counter() - start)
        return JSONResponse(content, status, {"Retry-After": "1"} if status == 429 else None)

    async def _in_time(self, request: Request, answer: Callable[[], Awaitable[Any]]) -> Any:
        """Raises Refusal: also where it takes too long, or the model fails."""
        self._check_token(request)
        wait = asyncio.timeout(self.settings.timeout_seconds)
        try:
            async with wait:
                self.waits.add(wait)
                return await answer()
        except TimeoutError as error:
            if self.ends_without_replica:
                raise Refusal(503, "ending", "the service ends, and no replica answers") from error
            raise Refusal(504, "timeout", f"not done within {self.settings.timeout_seconds:g} s") from error
        except (RayError, *LOST) as error:
            logger.exception("a request failed")
            reason = f"the model failed: {type(error).__name__}; the service's log has more"
            raise Refusal(500, "internal", reason) from error
        finally:
            self.waits.discard(wait)

    def _check_token(self, request: Request) -> None:
        token = self.settings.token
        if token is None:
            return
        given = request.headers.get("authorization", "")  # whose bytes starlette takes for Latin-1
        sent = (given.encode("latin-1"), given.encode())  # by clients that write UTF-8, and by those that Latin-1
        if not any(hmac.compare_digest(each, f"Bearer {token}".encode()) for each in sent):
            raise Refusal(401, "unauthorized", "the header 'Authorization: Bearer TOKEN' is missing or another's")

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise Refusal(404, "model_not_found", f"there is no model '{name}' here, but '{self.name}'")

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

    def _truncated(self, inputs: Sequence[str | SentPicture], about: About) -> list[int]:
        """Which inputs are texts that lose their end."""
        texts = [each for each in inputs if isinstance(each, str)]
        truncated = prepare_texts(self.processor, texts, about.text_length, False).truncated if texts else []
        return [place for place, each in enumerate(inputs) if isinstance(each, str) and each in truncated]

    @asynccontextmanager
    async def _admitted(self, number: int) -> AsyncIterator[None]:
        """Raises Refusal: so many never are; or as many wait as may, so that a queue never outgrows its time-out."""
        if number > self.settings.inputs:
            raise Refusal(413, "too_many", f"a request has at most {self.settings.inputs} inputs, not {number}")
        if self.pending + number > self.settings.pending:
            raise Refusal(429, "busy", f"{self.pending} inputs are waiting: ask again later")
        self.pending += number
        try:
            yield
        finally:
            self.pending -= number

    async def _features(self, inputs: Sequence[str | SentPicture], about: About) -> list[np.ndarray]:
        """Raises Refusal: the pictures have too many pixels, or one is damaged."""
        pixels = sum(each.pixels for each in inputs if isinstance(each, SentPicture))
        if pixels > self.settings.pixels:
            allowed = f"at most {self.settings.pixels:,} pixels"
            raise Refusal(413, "too_large", f"a request's pictures have {allowed} together, not {pixels:,}")
        tasks = [asyncio.ensure_future(self._feature(each, about)) for each in inputs]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _feature(self, given: str | SentPicture, about: About) -> np.ndarray:
        """`[width]` float32, of length 1."""
        if isinstance(given, SentPicture):
            return await self._pictures(await asyncio.to_thread(self._pixel_values, given, about.takes_bytes))
        if given not in self.known:
            self.known[given] = await self._texts(given)
        self.known.move_to_end(given)
        row = self.known[given]
        while len(self.known) > KEPT_TEXTS:
            self.known.popitem(last=False)
        return row

    def _pixel_values(self, picture: SentPicture, as_bytes: bool) -> np.ndarray:
        """`[3, height, width]`; of the picture in its own size nothing is left. Raises Refusal: it is damaged."""
        with self.decoding.taken(picture.pixels):
            return prepare_pictures(self.processor, [picture.decode()], as_bytes)[0].numpy()

    async def _compute_texts(self, texts: list[str]) -> list[np.ndarray]:
        return await self._compute("texts", texts)

    async def _compute_pictures(self, values: list[np.ndarray]) -> list[np.ndarray]:
        return await self._compute("pictures", np.stack(values))

    async def _compute(self, method: str, batch: Any) -> list[np.ndarray]:
        self.metrics.batch.observe(len(batch))
        async with asyncio.timeout(self.settings.timeout_seconds):  # nobody waits longer
            for _ in range(ATTEMPTS - 1):
                try:
                    return list(await getattr(self.model, method).remote(batch))
                except LOST:
                    self.metrics.retries.inc()
                    await asyncio.sleep(RETRY_SECONDS)
            return list(await getattr(self.model, method).remote(batch))
