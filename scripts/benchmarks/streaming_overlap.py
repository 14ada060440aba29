"""How much of the copies of a streamed model's weights lies behind its computation.

    python scripts/benchmarks/streaming_overlap.py --device cuda
    python scripts/benchmarks/streaming_overlap.py --device cpu --blocks 6 --width 512 --tokens 1024 --link_gib_s 0.5

A transformer of equal blocks is called with its weights on the device, streamed, and streamed without prefetch, where
each block is copied when the one before has computed. The ways take turns, and the median of each counts. On the CPU
there is no link: --link_gib_s makes each copy take as long as one of that rate would.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ascend import DeviceManager
from ascend.streaming import Stream, stop_streaming, stream_module
from ascend.streaming.host_copy import HostCopy
from runners.cli import ArgumentParser, UserError, one_line_errors, positive_int

GIB, HEAD = 2**30, 128


class Block(nn.Module):
    """Attention and a gated feed-forward network, `[1, tokens, width]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(self.norms[0](x)).unflatten(-1, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        gate, up = self.up(self.norms[1](x)).chunk(2, dim=-1)
        return x + self.down(nn.functional.silu(gate) * up)


class Transformer(nn.Module):
    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="streaming_overlap.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", metavar="NAME", help="npu, cuda or cpu (the best there is)")
    add("--blocks", type=positive_int, default=24, metavar="N", help="(24)")
    add("--width", type=positive_int, default=2560, metavar="N", help=f"a multiple of {HEAD} (2560)")
    add("--tokens", type=positive_int, default=4096, metavar="N", help="(4096)")
    add("--repeats", type=positive_int, default=5, metavar="N", help="of which the median counts (5)")
    add("--link_gib_s", type=float, metavar="RATE", help="of the pretended link of a CPU, in GiB/s")
    args = parser.parse_args(arguments)
    if args.width % HEAD:
        raise UserError(f"--width is a multiple of {HEAD}, which {args.width} is not")
    return args


def slow_down_copies(gib_s: float) -> None:
    fill = HostCopy.fill

    def fill_at_rate(self: HostCopy, buffer: Any) -> None:
        start = time.perf_counter()
        fill(self, buffer)
        time.sleep(max(0.0, self.nbytes() / (gib_s * GIB) - (time.perf_counter() - start)))

    HostCopy.fill = fill_at_rate  # type: ignore[method-assign]


class Ways:
    """The same weights on the device, and with the host."""

    def __init__(self, args: argparse.Namespace, manager: DeviceManager) -> None:
        self.manager = manager
        torch.manual_seed(0)
        with torch.device("meta"):
            self.resident, self.model = (Transformer(args.blocks, args.width).to(manager.dtype) for _ in range(2))
        for model, device in ((self.resident, manager.device), (self.model, torch.device("cpu"))):
            model.to_empty(device=device).eval().requires_grad_(False)
        for here, there in zip(self.resident.parameters(), self.model.parameters(), strict=True):
            there.copy_(here.normal_(0, 0.02))
        self.x = torch.randn(1, args.tokens, args.width).to(manager.device, manager.dtype)
        self.stream = stream_module(self.model, manager.device)

    def streamed(self) -> torch.Tensor:
        return self.model(self.x)

    def copied(self) -> None:
        """All blocks, one after the other, and nothing is computed."""
        buffers = self.stream.buffers
        for number, copy in enumerate(self.stream.copies):
            slot = buffers.slots[number % len(buffers.slots)]
            buffers.start(copy, slot)
            buffers.finish(slot)
        buffers.settle()

    def in_turn(self) -> torch.Tensor:
        """Without prefetch: no block is guessed to follow."""
        guess = self.stream.orders.go_on

        def guess_nothing(block: HostCopy) -> None:
            guess(block)

        self.stream.orders.go_on = guess_nothing  # type: ignore[method-assign]
        try:
            return self.model(self.x)
        finally:
            del self.stream.orders.go_on

    def run(self, name: str) -> tuple[float, torch.Tensor | None]:
        """Seconds, and what was computed."""
        call = {"resident": lambda: self.resident(self.x)}.get(name) or getattr(self, name)
        self.manager.synchronize()
        start = time.perf_counter()
        result = call()
        self.manager.synchronize()
        return time.perf_counter() - start, result


def run(args: argparse.Namespace) -> None:
    manager = DeviceManager(args.device)
    if args.link_gib_s is not None:
        if manager.device.type != "cpu":
            raise UserError("--link_gib_s is for --device cpu: other devices have a link")
        slow_down_copies(args.link_gib_s)
    ways = Ways(args, manager)
    names = ("resident", "streamed", "in_turn", "copied")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with torch.no_grad():
        expected = ways.resident(ways.x)
        same = {name: True for name in names}
        for repeat in range(args.repeats + 1):
            for name in names:
                took, result = ways.run(name)
                same[name] &= result is None or torch.equal(result, expected)
                if repeat:  # the first takes memory
                    seconds[name].append(took)
    stop_streaming(ways.model)
    print_table(ways.stream, {name: statistics.median(times) for name, times in seconds.items()}, same)


def print_table(stream: Stream, medians: dict[str, float], same: dict[str, bool]) -> None:
    size = sum(copy.nbytes() for copy in stream.copies)
    print(f"{len(stream.copies)} blocks of {size / len(stream.copies) / 2**20:,.0f} MiB on {stream.execution_device}")
    print("\n| | ms a call | of the copies hidden | result |\n|---|---:|---:|---|")
    for name, title in (("resident", "resident"), ("streamed", "streamed"), ("in_turn", "streamed without prefetch")):
        hidden = 1 - (medians[name] - medians["resident"]) / medians["copied"]
        share = "" if name == "resident" else f"{hidden:.0%}"
        print(f"| {title} | {1e3 * medians[name]:,.1f} | {share} | {'the same' if same[name] else 'another'} |")
    rate = size / medians["copied"] / GIB
    print(f"| the copies alone, {rate:.1f} GiB/s | {1e3 * medians['copied']:,.1f} | | |")


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        run(parse_arguments(arguments))


if __name__ == "__main__":
    main()
