"""What serve.py does: replicas of the model by Ray Serve, and requests by uvicorn until a signal ends it."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from ascend.device import DEVICE_TYPES, find_device
from runners.cli import (
    ArgumentParser,
    Terminated,
    UserError,
    file_path,
    one_line_errors,
    positive_float,
    positive_int,
    sigterm_raises,
)
from runners.clip.arguments import add_model_arguments, check_model_arguments
from runners.clip.serving.settings import Settings
from runners.ray_local import count_devices, quiet_ray, start_ray

TOKEN = "CLIP_SERVE_TOKEN"
INPUTS = 256
MEGA = 10**6
MIB = 2**20


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
    add(
        "--max_pending",
        type=positive_int,
        metavar="N",
        help="inputs that may wait, 429 beyond (8 batches a replica and --max_inputs)",
    )
    add(
        "--max_inputs",
        type=positive_int,
        metavar="N",
        help=f"of one request, 413 beyond ({INPUTS}, or --max_pending where that is less)",
    )
    add(
        "--max_megapixels",
        type=positive_int,
        default=64,
        metavar="N",
        help="of one request's pictures, 413 beyond, and of all that are decoded at a time, up to 25 MB each (64)",
    )
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
    inputs = args.max_inputs or min(INPUTS, args.max_pending or INPUTS)
    pending = args.max_pending or 8 * args.batch_size * replicas + inputs
    if inputs > pending:
        raise UserError(f"--max_inputs {inputs}: no request of so many is ever taken, with --max_pending {pending}")
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
        inputs,
        args.max_megapixels * MEGA,
        args.max_mib * MIB,
        args.timeout,
        token,
    )


def _token(args: argparse.Namespace) -> str | None:
    where = args.token_file or f"${TOKEN}"
    try:
        token = args.token_file.read_text(encoding="utf-8") if args.token_file else os.environ.get(TOKEN)
    except UnicodeDecodeError as error:
        raise UserError(f"the token of {where} is no UTF-8 text: {error.reason} at byte {error.start}") from error
    if token is None:
        return None
    words = token.split()
    if len(words) != 1:
        raise UserError(f"the token of {where} must be one word, not {len(words)}")
    return words[0]


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
    from runners.clip.serving.gateway import Gateway
    from runners.clip.serving.replica import deployment
    from runners.clip.serving.server import Server

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    cpus = settings.replicas if settings.kind == "cpu" else 1
    Image.MAX_IMAGE_PIXELS = None  # the gateway has a limit of its own
    start_ray(ray, settings.kind, cpus)
    try:
        with sigterm_raises():  # once more: Ray has taken the signal over
            serve.start(http_options={"location": "NoServer"}, logging_config={"log_level": "WARNING"})
            gateway = Gateway(_start(serve, deployment(settings).bind(settings)), settings)
            server = Server(gateway, args.host, args.port, lambda: _announce(args, settings))
            with suppress(KeyboardInterrupt, Terminated):  # which uvicorn raises again when it has ended by them
                server.run()
    finally:
        ray.shutdown()  # Serve's own, before it, would wait for replicas that are lost, and have Ray complain


def _announce(args: argparse.Namespace, settings: Settings) -> None:
    host = f"[{args.host}]" if ":" in args.host else args.host
    where = f"{settings.replicas} replica{'s' * (settings.replicas > 1)} on {settings.kind}"
    print(f"http://{host}:{args.port} serves {args.model}, {where}; SIGTERM or Ctrl-C ends it", flush=True)


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
