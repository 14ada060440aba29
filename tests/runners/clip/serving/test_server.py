"""The server says that it listens when it does, and ends in time."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("ray")
pytest.importorskip("prometheus_client")

from runners.clip.serving import gateway
from runners.clip.serving.gateway import Gateway
from runners.clip.serving.server import Server
from tests.runners.clip.serving.replicas import Handle, die_for_good, settings_for

pytestmark = pytest.mark.anyio
HOST = "127.0.0.1"
REQUEST = b'POST /v1/embeddings HTTP/1.1\r\nHost: here\r\nContent-Length: 14\r\n\r\n{"input": "a"}'


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def make_server(model: Path, listens: Callable[[], None]) -> Server:
    """At a port that is free."""
    return Server(Gateway(Handle(), settings_for(model)), HOST, 0, listens)


def port_of(server: Server) -> int:
    return server.servers[0].sockets[0].getsockname()[1]


async def test_connections_succeed_when_it_says_so(clip_dir: Path) -> None:
    def connect() -> None:
        socket.create_connection((HOST, port_of(server)), 60).close()
        server.should_exit = True

    server = make_server(clip_dir, connect)
    await server.serve()
    assert server.should_exit


@pytest.mark.parametrize("lost", [False, True])
async def test_it_ends_with_an_answer_to_what_it_took(
    clip_dir: Path, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "ENDING_SECONDS", 0.05)
    listening = asyncio.Event()
    server = make_server(clip_dir, listening.set)
    handle = server.gateway.model
    handle.free.clear()
    serving = asyncio.create_task(server.serve())
    await listening.wait()
    port = port_of(server)
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(REQUEST)
    while not server.gateway.pending:
        await asyncio.sleep(0.01)
    if lost:
        die_for_good(handle)
    server.should_exit = True
    with pytest.raises(OSError):
        while True:  # until it listens no more
            socket.create_connection((HOST, port), 60).close()
            await asyncio.sleep(0.01)
    if not lost:
        handle.free.set()
    status = await reader.readline()
    assert status.split()[1] == (b"503" if lost else b"200")
    writer.close()
    await serving
