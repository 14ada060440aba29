"""Put load on CLIP's service: what batching brings, and whether anything is lost.

    python scripts/benchmarks/clip_load.py throughput                 # with batches against without, by wrk
    python scripts/benchmarks/clip_load.py losses --requests 10000    # malformed requests, a replica killed, a stop

`throughput` starts the service without batches and with them in turn, lets wrk (Debian: apt-get install wrk) ask for
embeddings of texts that never come twice and of pictures, and compares the medians. The replica computes with one
thread. `losses` sends requests of which some are malformed, kills the replica in the middle, ends the service while
more are under way, and counts answers: each request one, of the right kind, and equal features for equal inputs.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from runners.cli import ArgumentParser, UserError, file_path, one_line_errors, positive_int

MODEL = ROOT / "examples/clip/demo_model"
START_SECONDS = 300  # of a busy machine
PICTURES = 20
LOST_SECONDS = 120  # a replica is started anew
MALFORMED = ('{"input', '{"input": []}', '{"input": [{"image": "no picture"}]}', '{"inputs": "a text"}')
# wrk calls request() for each: a counter makes texts that were never seen.
SCRIPTS = {
    "texts": """
local number = 0
wrk.method = "POST"
local seed = tostring(os.time())
request = function()
  number = number + 1
  return wrk.format(nil, "/v1/embeddings", nil, '{"input": ["a red circle ' .. number .. " of " .. seed .. '"]}')
end
""",
    "pictures": """
wrk.method = "POST"
wrk.path = "/v1/embeddings"
wrk.body = '{"input": [{"image": "PICTURE"}]}'
""",
}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="clip_load.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("throughput", "losses"))
    parser.add_argument("--model", type=file_path, default=MODEL, metavar="DIR", help="(examples/clip/demo_model)")
    parser.add_argument("--port", type=positive_int, default=8017, metavar="N", help="(8017)")
    parser.add_argument("--batch-size", type=positive_int, default=32, metavar="N", help="of the batches (32)")
    parser.add_argument("--connections", type=positive_int, default=64, metavar="N", help="at once (64)")
    parser.add_argument("--seconds", type=positive_int, default=10, metavar="N", help="of a round of wrk (10)")
    parser.add_argument("--rounds", type=positive_int, default=3, metavar="N", help="of wrk, in turn (3)")
    parser.add_argument("--requests", type=positive_int, default=10_000, metavar="N", help="of `losses` (10000)")
    return parser.parse_args(arguments)


@contextmanager
def service(args: argparse.Namespace, *options: object) -> Iterator[subprocess.Popen[str]]:
    """The program as a user starts it, ready; ended by SIGTERM, if it runs still."""
    command = [sys.executable, ROOT / "examples/clip/serve.py", "--model", args.model, "--port", args.port, *options]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, text=True)
        try:
            wait_for(process, args.port, log)
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait(START_SECONDS)


def wait_for(process: subprocess.Popen[str], port: int, log: Any) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            log.seek(0)
            raise UserError(f"the service ended: {log.read().strip().splitlines()[-1]}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise UserError(f"the service is not ready after {START_SECONDS} s")


def picture(seed: int) -> str:
    """A PNG in base64, of 64 x 64 pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).resize((64, 64)).save(data, "png")
    return base64.b64encode(data.getvalue()).decode()


def rate(args: argparse.Namespace, script: Path) -> float:
    """Answers a second, by wrk."""
    command = ["wrk", "-t1", f"-c{args.connections}", f"-d{args.seconds}s", "--timeout", "30s", "-s", script]
    done = subprocess.run([*map(str, command), f"http://127.0.0.1:{args.port}"], capture_output=True, text=True)
    found = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)
    if found is None or "Non-2xx" in done.stdout:
        raise UserError(f"wrk: {(done.stdout + done.stderr).strip().splitlines()[-2:]}")
    return float(found[1])


def throughput(args: argparse.Namespace) -> None:
    if shutil.which("wrk") is None:
        raise UserError("wrk is not installed: apt-get install wrk")
    rates: dict[tuple[str, int], list[float]] = {}
    sizes = (1, args.batch_size)
    with tempfile.TemporaryDirectory() as name:
        for kind, text in SCRIPTS.items():
            (Path(name) / f"{kind}.lua").write_text(text.replace("PICTURE", picture(0)))
        for _ in tqdm(range(args.rounds), desc="rounds"):
            for size in sizes:
                with service(args, "--batch-size", size, "--max_pending", 4 * args.connections):
                    for kind in SCRIPTS:
                        rates.setdefault((kind, size), []).append(rate(args, Path(name) / f"{kind}.lua"))
    print(f"| requests a second | batches of 1 | up to {args.batch_size} | |\n|---|---:|---:|---:|")
    for kind in SCRIPTS:
        single, batched = (statistics.median(rates[kind, size]) for size in sizes)
        print(f"| {kind} | {single:.0f} | {batched:.0f} | {batched / single:.2f}x |")


def kill_replica() -> int:
    """SIGKILL to what computes the model. Returns its process id."""
    for process in psutil.process_iter(["name", "cmdline"]):
        if any("ServeReplica:clip:model" in part for part in process.info["cmdline"] or ()):
            process.kill()
            return process.pid
    raise UserError("no process of a replica was found")


class Losses:
    """Sends requests, some malformed, and keeps what came of each."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.url = args, f"http://127.0.0.1:{args.port}/v1/embeddings"
        self.answers: Counter[tuple[str, object]] = Counter()
        self.rows: dict[str, list[np.ndarray]] = {}
        self.random = random.Random(0)
        self.pictures = [picture(seed) for seed in range(PICTURES)]

    async def send(self, session: Any, number: int) -> None:
        malformed = number % 10 == 0
        # Texts are remembered, so each is another; pictures are computed each time.
        name = f"a circle, {number}" if number % 2 else f"picture {number % len(self.pictures)}"
        given = name if number % 2 else {"image": self.pictures[number % len(self.pictures)]}
        body = self.random.choice(MALFORMED) if malformed else json.dumps({"input": [given]})
        kind = "malformed" if malformed else "good"
        async with session.post(self.url, data=body) as response:
            content = json.loads(await response.read())
            self.answers[kind, response.status] += 1
        if response.status == 200:
            self.rows.setdefault(name, []).append(np.array(content["data"][0]["embedding"]))

    async def all(self) -> None:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=LOST_SECONDS)
        numbers = iter(tqdm(range(self.args.requests), desc="requests"))
        middle = self.args.requests // 2

        async def client(session: Any) -> None:
            for number in numbers:
                if number == middle:
                    print(f"\nkilled the replica, process {kill_replica()}", flush=True)
                await self.send(session, number)

        async with aiohttp.ClientSession(timeout=timeout) as session:
            await asyncio.gather(*(client(session) for _ in range(self.args.connections)))

    def check(self) -> None:
        """Raises UserError: a request has no answer, or another than it should."""
        allowed = {("good", 200), ("malformed", 400)}
        wrong = {key: count for key, count in self.answers.items() if key not in allowed}
        spread = max(float(np.abs(np.stack(rows) - rows[0]).max()) for rows in self.rows.values())
        print(f"{dict(self.answers)}; equal pictures differ by at most {spread:.1e}")
        if wrong or self.answers.total() != self.args.requests or spread > 1e-4:
            raise UserError(f"{self.args.requests} requests, {self.answers.total()} answers, of them wrong: {wrong}")


async def stop_under_load(args: argparse.Namespace, process: subprocess.Popen[str]) -> None:
    """Requests that were taken when the service is ended are answered; the others find that nobody listens."""
    import aiohttp

    outcomes: Counter[object] = Counter()
    stopped = False

    async def ask(session: Any, number: int) -> None:
        try:
            body = json.dumps({"input": [f"the last circle, {number}"]})
            async with session.post(f"http://127.0.0.1:{args.port}/v1/embeddings", data=body) as response:
                await response.read()
                outcomes[response.status] += 1
        except (aiohttp.ClientConnectorError, aiohttp.ClientOSError):  # or its connection was never accepted
            outcomes["nobody listens"] += 1
        except aiohttp.ClientError as error:
            outcomes[f"lost ({type(error).__name__})"] += 1

    # A connection for each: on one that is kept, a request and the server's farewell may cross.
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True, limit=0)) as session:
        tasks = []
        for number in range(40 * args.connections):
            tasks.append(asyncio.create_task(ask(session, number)))
            await asyncio.sleep(0.001)
            if not stopped and number > 10 * args.connections:
                process.send_signal(signal.SIGTERM)
                stopped = True
        await asyncio.gather(*tasks)
    print(f"stopped under load: {dict(outcomes)}")
    if set(outcomes) - {200, 429, "nobody listens"} or not outcomes[200]:
        raise UserError(f"a request was lost: {dict(outcomes)}")


def losses(args: argparse.Namespace) -> None:
    many = 40 * args.connections
    with service(args, "--batch-size", args.batch_size, "--max_pending", many, "--timeout", LOST_SECONDS) as process:
        sent = Losses(args)
        asyncio.run(sent.all())
        sent.check()
        asyncio.run(stop_under_load(args, process))
        if process.wait(START_SECONDS):
            raise UserError(f"the service ended with exit code {process.returncode}")


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        args = parse_arguments(arguments)
        {"throughput": throughput, "losses": losses}[args.what](args)


if __name__ == "__main__":
    main()
