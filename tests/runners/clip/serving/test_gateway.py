"""The gateway in front of replicas that are made up here: what it lets in, and what becomes of a lost replica."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("ray")
pytest.importorskip("prometheus_client")

from ray.exceptions import ActorDiedError

from runners.clip.checkpoint import SOFTMAX, Scoring
from runners.clip.serving import gateway
from runners.clip.serving.gateway import Gateway
from runners.clip.serving.replica import About
from runners.clip.serving.settings import Settings
from tests.runners.clip.serving.test_protocol import RED

pytestmark = pytest.mark.anyio

SETTINGS: dict[str, Any] = {
    "backend": "torch",
    "dtype": None,
    "kernels": False,
    "compiled": False,
    "kind": "cpu",
    "replicas": 1,
    "threads": 1,
    "batch_size": 4,
    "wait_seconds": 0.05,
    "pending": 4,
    "inputs": 8,
    "body_bytes": 4000,
    "timeout_seconds": 30.0,
    "token": None,
}


class Method:
    """As of Ray Serve's handle."""

    def __init__(self, answer: Callable[..., Awaitable[Any]]) -> None:
        self.answer = answer

    def remote(self, *given: Any) -> Awaitable[Any]:
        return self.answer(*given)


class Handle:
    """Texts are as long as their feature says. `lost` calls end with their replica, and `free` lets others go on."""

    def __init__(self) -> None:
        self.lost, self.calls, self.free = 0, 0, asyncio.Event()
        self.free.set()
        self.about, self.texts, self.pictures = Method(self._about), Method(self._features), Method(self._features)

    async def _about(self) -> About:
        return About("cpu", 77, False, Scoring(SOFTMAX, 10.0, 0.0))

    async def _features(self, batch: Any) -> np.ndarray:
        self.calls += 1
        if self.lost:
            self.lost -= 1
            raise ActorDiedError
        await self.free.wait()
        angles = [float(len(each)) for each in batch]
        return np.array([[np.cos(angle), np.sin(angle)] for angle in angles], np.float32)


async def ask(app: Any, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """Status and content of an answer of an ASGI application, as a server would ask for it."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    scope = {
        "type": "http",
        "method": "GET" if body is None else "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in (headers or {}).items()],
    }
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    content = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], content.decode() if path == "/metrics" else json.loads(content)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def make(clip_dir: Path) -> Callable[..., tuple[Any, Handle]]:
    def make(**settings: Any) -> tuple[Any, Handle]:
        handle = Handle()
        return Gateway(handle, Settings(str(clip_dir), **SETTINGS | settings)).app(), handle

    return make


async def test_features_of_texts_and_pictures(make: Callable[..., tuple[Any, Handle]]) -> None:
    app, handle = make()
    status, content = await ask(app, "/v1/embeddings", {"input": ["a", {"image": RED}, "long " * 100]})
    assert status == 200 and len(content["data"]) == 3 and content["truncated_inputs"] == [2]
    np.testing.assert_allclose(content["data"][0]["embedding"], [np.cos(1), np.sin(1)], rtol=1e-6)
    labels = ["one", "three"]
    asked = {
        "inputs": RED,
        "parameters": {"candidate_labels": labels},
    }  # pixel values are three rows, as long as "one"
    status, content = await ask(app, "/v1/zero-shot-image-classification", asked)
    assert (
        status == 200 and content[0]["label"] == "one" and sum(each["score"] for each in content) == pytest.approx(1)
    )
    _, metrics = await ask(app, "/metrics")
    assert 'clip_requests_total{endpoint="embeddings",status="200"} 1.0' in metrics
    assert "clip_batch_inputs_sum 6.0" in metrics and "clip_batch_inputs_count 4.0" in metrics  # of both kinds
    assert handle.calls == 4
    await ask(app, "/v1/embeddings", {"input": ["a", "one"]})
    assert handle.calls == 4, "known texts"


async def test_a_lost_replica_takes_no_request_with_it(
    make: Callable[..., tuple[Any, Handle]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "RETRY_SECONDS", 0.0)
    app, handle = make()
    handle.lost = gateway.ATTEMPTS - 1
    status, _ = await ask(app, "/v1/embeddings", {"input": "a"})
    assert status == 200 and handle.calls == gateway.ATTEMPTS
    handle.lost = gateway.ATTEMPTS
    status, content = await ask(app, "/v1/embeddings", {"input": "b"})
    assert status == 500 and content["error"]["code"] == "internal"
    assert "clip_retries_total 8.0" in (await ask(app, "/metrics"))[1]


async def test_what_cannot_wait_is_refused_and_nothing_stays_behind(make: Callable[..., tuple[Any, Handle]]) -> None:
    app, handle = make(pending=4)
    handle.free.clear()
    first = asyncio.create_task(ask(app, "/v1/embeddings", {"input": ["a", "b", "c"]}))
    while (await ask(app, "/health"))[1]["pending"] < 3:
        await asyncio.sleep(0)
    status, content = await ask(app, "/v1/embeddings", {"input": ["a", "b"]})
    assert status == 429 and content["error"] == {
        "message": "3 inputs are waiting: ask again later",
        "type": "server_error",
        "code": "busy",
    }
    handle.free.set()
    assert (await first)[0] == 200 and (await ask(app, "/health"))[1]["pending"] == 0
    assert (await ask(app, "/v1/embeddings", {"input": ["a"] * 6}))[
        0
    ] == 200  # more than may wait, as nobody else does


@pytest.mark.parametrize(
    ("settings", "body", "expected"),
    [
        ({"body_bytes": 20}, {"input": "a" * 30}, (413, "too_large")),
        ({"inputs": 2}, {"input": ["a"] * 3}, (413, "too_many")),
        ({}, {"input": "a", "model": "another"}, (404, "model_not_found")),
        ({}, b"{", (400, "bad_request")),
        ({"token": "secret"}, {"input": "a"}, (401, "unauthorized")),
    ],
)
async def test_refusals(
    make: Callable[..., tuple[Any, Handle]], settings: dict[str, Any], body: Any, expected: tuple[int, str]
) -> None:
    app, handle = make(**settings)
    status, content = await ask(app, "/v1/embeddings", body)
    assert (status, content["error"]["code"]) == expected and not handle.calls


async def test_a_token_lets_in(make: Callable[..., tuple[Any, Handle]]) -> None:
    app, _ = make(token="secret")
    for path, body in (("/v1/embeddings", {"input": "a"}), ("/metrics", None)):
        assert (await ask(app, path, body, {"authorization": "Bearer other"}))[0] == 401
        assert (await ask(app, path, body, {"authorization": "Bearer secret"}))[0] == 200
    assert (await ask(app, "/health"))[0] == 200


async def test_health_is_that_of_the_replicas(make: Callable[..., tuple[Any, Handle]]) -> None:
    app, handle = make()
    status, content = await ask(app, "/health")
    assert status == 200 and content["status"] == "ok" and content["device"] == "cpu"

    async def dies() -> About:
        raise ActorDiedError

    handle.about = Method(dies)
    status, content = await ask(app, "/health")
    assert status == 503 and content["status"] == "no replica answers"


async def test_what_takes_too_long_is_ended(make: Callable[..., tuple[Any, Handle]]) -> None:
    app, handle = make(timeout_seconds=0.01)
    handle.free.clear()
    assert (await ask(app, "/v1/embeddings", {"input": ["a", "b"]}))[1]["error"]["code"] == "timeout"
    assert (await ask(app, "/health"))[1]["pending"] == 0
