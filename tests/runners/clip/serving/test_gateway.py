"""The gateway in front of replicas that are made up here: what it lets in, and what becomes of a lost replica."""

from __future__ import annotations

import asyncio
import base64
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("ray")
pytest.importorskip("prometheus_client")

from ray.exceptions import ActorDiedError

from runners.clip.serving import gateway
from runners.clip.serving.gateway import Gateway
from runners.clip.serving.replica import About
from tests.runners.clip.serving.replicas import Handle, Method, die_for_good, settings_for
from tests.runners.clip.serving.test_protocol import RED, encoded

pytestmark = pytest.mark.anyio


async def ask(app: Any, path: str, body: Any = None, headers: dict[str, bytes] | None = None) -> tuple[int, Any]:
    """Status and content of an answer of an ASGI application, as a server would ask for it."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, content = await answered(app, path, body is None, headers, [{"type": "http.request", "body": data}])
    return status, content.decode() if path == "/metrics" else json.loads(content)


async def answered(
    app: Any, path: str, gets: bool, headers: dict[str, bytes] | None, messages: Sequence[dict[str, Any]]
) -> tuple[int, bytes]:
    """As `ask`, of what a server has received."""
    scope = {
        "type": "http",
        "method": "GET" if gets else "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.encode(), value) for name, value in (headers or {}).items()],
    }
    sent: list[dict[str, Any]] = []
    received = iter(messages)

    async def receive() -> dict[str, Any]:
        return next(received)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def make_gateway(clip_dir: Path) -> Callable[..., Gateway]:
    return lambda **settings: Gateway(Handle(), settings_for(clip_dir, **settings))


@pytest.fixture
def make(make_gateway: Callable[..., Gateway]) -> Callable[..., tuple[Any, Handle]]:
    def make(**settings: Any) -> tuple[Any, Handle]:
        made = make_gateway(**settings)
        return made.app(), made.model

    return make


async def until_pending(app: Any, number: int) -> None:
    while (await ask(app, "/health"))[1]["pending"] != number:
        await asyncio.sleep(0)


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
    await until_pending(app, 3)
    status, content = await ask(app, "/v1/embeddings", {"input": ["a", "b"]})
    assert status == 429 and content["error"] == {
        "message": "3 inputs are waiting: ask again later",
        "type": "server_error",
        "code": "busy",
    }
    handle.free.set()
    assert (await first)[0] == 200 and (await ask(app, "/health"))[1]["pending"] == 0
    assert (await ask(app, "/v1/embeddings", {"input": ["a"] * 4}))[0] == 200


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
        assert (await ask(app, path, body, {"authorization": b"Bearer other"}))[0] == 401
        assert (await ask(app, path, body, {"authorization": b"Bearer secret"}))[0] == 200
    assert (await ask(app, "/health"))[0] == 200


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])  # as curl writes headers, and as Python's http.client
async def test_a_token_may_have_any_letters(make: Callable[..., tuple[Any, Handle]], encoding: str) -> None:
    app, _ = make(token="schlüssel")
    for token, status in (("schlüssel", 200), ("schlussel", 401), ("schlússel", 401)):
        headers = {"authorization": f"Bearer {token}".encode(encoding)}
        assert (await ask(app, "/v1/embeddings", {"input": "a"}, headers))[0] == status


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


async def test_nobody_computes_for_ever_what_nobody_waits_for(make: Callable[..., tuple[Any, Handle]]) -> None:
    app, handle = make(timeout_seconds=0.2, wait_seconds=0.001)
    well = handle.texts
    while (await ask(app, "/v1/embeddings", {"input": "first"}))[0] != 200:
        pass
    calls = handle.calls
    die_for_good(handle)
    for text in "abcd":
        assert (await ask(app, "/v1/embeddings", {"input": text}))[0] == 504
    handle.texts = well
    for number in range(50):  # some more may have to wait for those whose time is not over
        if (await ask(app, "/v1/embeddings", {"input": f"text {number}"}))[0] == 200:
            break
    assert handle.calls == calls + 1


async def test_a_client_that_leaves_in_its_upload_is_counted_and_no_more(
    make: Callable[..., tuple[Any, Handle]],
) -> None:
    app, handle = make()
    part = {"type": "http.request", "body": b'{"input": ', "more_body": True}
    await answered(app, "/v1/embeddings", False, None, [part, {"type": "http.disconnect"}])
    assert 'clip_requests_total{endpoint="embeddings",status="499"} 1.0' in (await ask(app, "/metrics"))[1]
    assert (await ask(app, "/health"))[1]["pending"] == 0 and not handle.calls


def cut_off(width: int, height: int) -> str:
    """The start of a picture in base64: who decodes it finds out."""
    data = base64.b64decode(encoded(Image.effect_noise((width, height), 80)))
    return base64.b64encode(data[:1000]).decode()


async def test_pixels_are_counted_before_they_are_decoded(make: Callable[..., tuple[Any, Handle]]) -> None:
    app, handle = make(pixels=10_000)
    pictures = [{"image": cut_off(100, 60)}, {"image": cut_off(80, 60)}]
    status, content = await ask(app, "/v1/embeddings", {"input": pictures})
    assert status == 413 and content["error"]["message"] == (
        "a request's pictures have at most 10,000 pixels together, not 10,800"
    )
    asked = {"inputs": cut_off(200, 60), "parameters": {"candidate_labels": ["one"]}}
    assert (await ask(app, "/v1/zero-shot-image-classification", asked))[0] == 413
    status, content = await ask(app, "/v1/embeddings", {"input": pictures[:1]})
    assert status == 400 and content["error"]["code"] == "bad_picture", "within the limit it is decoded"
    assert not handle.calls and (await ask(app, "/health"))[1]["pending"] == 0


async def test_nothing_is_decoded_that_is_not_admitted(make: Callable[..., tuple[Any, Handle]]) -> None:
    app, handle = make(pending=2, inputs=2)
    handle.free.clear()
    first = asyncio.create_task(ask(app, "/v1/embeddings", {"input": ["a", "b"]}))
    await until_pending(app, 2)
    assert (await ask(app, "/v1/embeddings", {"input": {"image": cut_off(60, 60)}}))[0] == 429
    handle.free.set()
    assert (await first)[0] == 200


async def test_all_requests_together_decode_no_more_pixels_than_one_may(make_gateway: Callable[..., Gateway]) -> None:
    made = make_gateway(pixels=20)
    app = made.app()
    with made.decoding.taken(10):
        task = asyncio.create_task(ask(app, "/v1/embeddings", {"input": {"image": RED}}))  # of 12 pixels
        await until_pending(app, 1)
        done, _ = await asyncio.wait({task}, timeout=0.2)
        assert not done and not made.model.calls
    assert (await task)[0] == 200 and made.decoding.free == 20


@pytest.fixture
def strict() -> Iterator[None]:
    """Torch warns each time, and that is an error."""
    torch.set_warn_always(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield
    torch.set_warn_always(False)


@pytest.mark.usefixtures("strict")
async def test_features_that_cannot_be_written_to_are_no_news(make: Callable[..., tuple[Any, Handle]]) -> None:
    app, _ = make()
    asked = {"inputs": RED, "parameters": {"candidate_labels": ["one", "three"]}}
    assert (await ask(app, "/v1/zero-shot-image-classification", asked))[0] == 200


async def test_what_ends_without_replicas_refuses_what_waits(
    make_gateway: Callable[..., Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "ENDING_SECONDS", 0.05)
    made = make_gateway(timeout_seconds=600.0)
    app, handle = made.app(), made.model
    handle.free.clear()
    answered_in_the_end = asyncio.create_task(ask(app, "/v1/embeddings", {"input": "a"}))
    await until_pending(app, 1)
    ending = asyncio.create_task(made.refuse_without_replica())
    handle.free.set()
    assert (await answered_in_the_end)[0] == 200 and not ending.done()

    die_for_good(handle)
    refused = asyncio.create_task(ask(app, "/v1/embeddings", {"input": "b"}))
    await ending
    status, content = await asyncio.wait_for(refused, 60)
    assert status == 503 and content["error"]["code"] == "ending"
    assert (await ask(app, "/health"))[1]["pending"] == 0
