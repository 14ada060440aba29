"""A server of OpenAI's chat completions on this machine, which answers as it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

GOOD = "A red circle on white.\n\n  Make the circle blue. \nA blue circle on white.\n"


class Endpoint:
    """`answers` are a text, or a status to refuse with, one for each request; the last one stays."""

    def __init__(self, server: HTTPServer) -> None:
        self.url = f"http://127.0.0.1:{server.server_port}/v1"
        self.answers: list[str | int] = [GOOD]
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.raw: bytes | None = None  # in the place of JSON

    def reply(self, handler: BaseHTTPRequestHandler) -> None:
        self.requests.append(json.loads(handler.rfile.read(int(handler.headers["Content-Length"]))))
        self.keys.append(handler.headers["Authorization"])
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        message = {"role": "assistant", "content": answer}
        body: dict[str, Any] = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": []}
        if isinstance(answer, int):
            body = {"error": {"message": "told to"}}
        elif answer != "no choice":
            body["choices"] = [{"index": 0, "finish_reason": "stop", "message": message}]
        handler.send_response(answer if isinstance(answer, int) else 200)
        handler.send_header("Content-Type", "text/html" if self.raw else "application/json")
        handler.end_headers()
        handler.wfile.write(self.raw or json.dumps(body).encode())


@contextmanager
def chat_server() -> Iterator[Endpoint]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            made.reply(self)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    made = Endpoint(server)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
