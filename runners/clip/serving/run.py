"""What serve.py does: replicas of the model by Ray Serve, and requests by uvicorn until a signal ends it."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import math
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ascend.device import DEVICE_TYPES, find_device
from runners.cli import ArgumentParser, UserError, file_path, one_line_errors, positive_float, positive_int
from runners.clip.arguments import add_model_arguments, check_model_arguments
from runners.clip.serving.settings import Settings
from runners.ray_local import count_devices, quiet_ray, start_ray

TOKEN = "CLIP_SERVE_TOKEN"
MIB = 2**20
SPARE_SECONDS = 5.0  # beyond a request's own time-out, after which nobody waits for it


def parse_arguments(program: str, description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser, batch_size=16)
    add = parser.add_argument_group("replicas").add_argument
    add("--replicas", type=positive_int, metavar="N", help="on a device each (all devices of the kind; 1 on the CPU)")
    add("--threads", type=positive_int, default=1, metavar="N", help="of a replica on the CPU (1)")
    add = parser.add_argument_group("service").add_argument
    add("--host", default="127.0.0.1", help="address to listen at (127.0.0.1, which only this machine reaches)")
    add("--port", type=positive_int, default=8000, metavar="N", help="(8000)")
    add("--token_file", type=file_path, metavar="FILE", help=f"holds what clients bring as Bearer token (${TOKEN})")
    add("--wait_ms", type=positive_float, default=5.0, metavar="N", help="a batch waits so long for more inputs (5)")
    add("--max_pending", type=positive_int, metavar="N", help="inputs that may wait, 429 beyond (8 batches a replica)")
    add("--max_inputs", type=positive_int, default=256, metavar="N", help="of one request, 413 beyond (256)")
    add("--max_mib", type=positive_int, default=32, metavar="N", help="of one request, 413 beyond (32)")
    add("--timeout", type=positive_float, default=30.0, metavar="S", help="of one request, 504 beyond (30)")
    args = parser.parse_args(arguments)
    check_model_arguments(args)
    return args


def settings_of(args: argparse.Namespace) -> Settings:
    """Raises UserError, DeviceError: there is no such device, or no token where there has to be one."""
    kind = find_device(None if args.device == "auto" else args.device).type
    if args.device not in ("auto", *DEVICE_TYPES):
        raise UserError(f"--device {args.device}: replicas get a device of that kind each; take {kind}")
    there = count_devices(kind)
    replicas = args.replicas or (1 if kind == "cpu" else there)
    if kind != "cpu" and replicas > there:
        raise UserError(f"--replicas {replicas}: there are {there} devices of the kind {kind}")
    token = _token(args)
    if token is None and not _is_loopback(args.host):
        raise UserError(f"--host {args.host} lets others in: give a token, --token_file or ${TOKEN}")
    dtype = args.dtype or ("float16" if args.fp16 else None)
    model = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model
    pending = args.max_pending or 8 * args.batch_size * replicas
    return Settings(
        model,
        args.backend,
        dtype,
        args.FA,
        args.dynamo,
        kind,
        replicas,
        args.threads,
        args.batch_size,
        args.wait_ms / 1000,
        pending,
        args.max_inputs,
        args.max_mib * MIB,
        args.timeout,
        token,
    )


def _token(args: argparse.Namespace) -> str | None:
    token = args.token_file.read_text(encoding="utf-8") if args.token_file else os.environ.get(TOKEN)
    if token is not None and not token.strip():
        raise UserError(f"the token of {args.token_file or f'${TOKEN}'} is empty")
    return token and token.strip()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_port(host: str, port: int) -> None:
    """Raises UserError: nothing can listen there, as Ray Serve would say late and at length."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: {reason}; take another") from error


def run(args: argparse.Namespace) -> None:
    settings = settings_of(args)
    check_port(args.host, args.port)
    quiet_ray()
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise UserError(f"Ray Serve is not installed ({error}): pip install -r requirements-serve.txt") from error
    import uvicorn

    from runners.clip.serving.gateway import Gateway
    from runners.clip.serving.replica import deployment

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    cpus = settings.replicas if settings.kind == "cpu" else 1
    start_ray(ray, settings.kind, cpus)
    try:
        serve.start(http_options={"location": "NoServer"}, logging_config={"log_level": "WARNING"})
        app = Gateway(_start(serve, deployment(settings).bind(settings)), settings).app()
        where = f"{settings.replicas} replica{'s' * (settings.replicas > 1)} on {settings.kind}"
        print(f"http://{args.host}:{args.port} serves {args.model}, {where}; SIGTERM or Ctrl-C ends it", flush=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _ignore)  # uvicorn raises them again in the end
        # It listens no more after a signal, and ends when those that it read are answered.
        uvicorn.run(
            app,
            host=args.host,
            port=args.port,
            log_level="warning",
            timeout_graceful_shutdown=math.ceil(settings.timeout_seconds + SPARE_SECONDS),
        )
    finally:
        serve.shutdown()
        ray.shutdown()


def _ignore(*_: Any) -> None:
    pass


def _start(serve: Any, application: Any) -> Any:
    """Returns once all replicas have the model. Raises UserError where they cannot load it."""
    try:
        return serve.run(application, name="clip", route_prefix="/")
    except RuntimeError as error:
        raise UserError(f"the model does not load: {_reason(serve) or error}") from error


def _reason(serve: Any) -> str | None:
    """The last line of what a replica ended with."""
    application = serve.status().applications.get("clip")
    messages = [each.message for each in application.deployments.values() if each.message] if application else []
    lines = [line for message in messages for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and not line.startswith(" ")]
    return (errors or lines or [None])[-1]


def main(program: str, description: str | None, arguments: Sequence[str] | None = None) -> None:
    """Run the command line of `program`, which `description` describes."""
    with one_line_errors():
        run(parse_arguments(program, description, arguments))
