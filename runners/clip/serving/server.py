"""uvicorn with the service's beginning and end."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Callable

import uvicorn

from runners.clip.serving.gateway import Gateway

SPARE_SECONDS = 5.0  # beyond a request's own time-out, after which nobody waits for it


class Server(uvicorn.Server):
    """After a signal it listens no more, and ends when the requests that it read are answered.

    Args:
        listens: called as soon as connections succeed.
    """

    def __init__(self, gateway: Gateway, host: str, port: int, listens: Callable[[], None]) -> None:
        seconds = math.ceil(gateway.settings.timeout_seconds + SPARE_SECONDS)
        app = gateway.app()
        super().__init__(uvicorn.Config(app, host, port, log_level="warning", timeout_graceful_shutdown=seconds))
        self.gateway, self.listens = gateway, listens

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listens()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        refusing = asyncio.create_task(self.gateway.refuse_without_replica())
        try:
            await super().shutdown(sockets)
        finally:
            refusing.cancel()
