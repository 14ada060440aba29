"""What the emulator costs: the UNet of SD2.1-base on the emulated NPU against the same UNet on the CPU.

    python -m emulator run --soc Ascend910B3 -- python scripts/benchmarks/benchmark_emulator.py
    python -m emulator run --soc Ascend310P3 -- python scripts/benchmarks/benchmark_emulator.py \\
        --dtype float16 --pixels 128

Both are timed in turns in one process, after a warm-up; the ratio is the median over the rounds. The memory of the
process shows that the device's weights exist once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from diffusers import UNet2DConditionModel
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ascend.device import DeviceManager
from runners.cli import ArgumentParser, one_line_errors, positive_int
from runners.unet_cost import PROMPT_TOKENS
from scripts.benchmarks.benchmark import SD21_BASE_UNET

LATENT_PIXELS = 8
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="benchmark_emulator.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights and latents (bfloat16)")
    parser.add_argument("--pixels", type=positive_int, default=64, metavar="N", help="width and height (64)")
    parser.add_argument("--rounds", type=positive_int, default=3, metavar="N", help="(3)")
    return parser.parse_args(arguments)


@torch.no_grad()
def seconds_of(unet: UNet2DConditionModel, inputs: tuple[torch.Tensor, ...], manager: DeviceManager) -> float:
    inputs = tuple(tensor.to(unet.device) for tensor in inputs)
    manager.synchronize()
    start = time.perf_counter()
    unet(*inputs)
    manager.synchronize()
    return time.perf_counter() - start


def resident() -> int:
    return psutil.Process().memory_info().rss


def run(args: argparse.Namespace) -> None:
    manager = DeviceManager("npu")
    dtype = DTYPES[args.dtype]
    torch.manual_seed(0)
    on_cpu = UNet2DConditionModel(**SD21_BASE_UNET).to(dtype).eval()
    weights = sum(parameter.nbytes for parameter in on_cpu.parameters())
    on_npu = UNet2DConditionModel(**SD21_BASE_UNET).to(dtype).eval()
    on_npu.load_state_dict(on_cpu.state_dict())
    on_npu.to(manager.device)
    side = args.pixels // LATENT_PIXELS
    inputs = (
        torch.randn(2, 4, side, side, dtype=dtype),
        torch.tensor(500),
        torch.randn(2, PROMPT_TOKENS, on_cpu.config.cross_attention_dim, dtype=dtype),
    )
    before = resident()
    seconds: dict[str, list[float]] = {"cpu": [], "npu": []}
    for number in tqdm(range(args.rounds + 1), desc="rounds"):
        for name, unet in (("npu", on_npu), ("cpu", on_cpu)):
            taken = seconds_of(unet, inputs, manager)
            if number == 0 and name == "npu":
                added = resident() - before  # by a forward pass on the device, before the CPU packs weights of its own
            if number:
                seconds[name].append(taken)
    ratio = statistics.median(npu / cpu for npu, cpu in zip(seconds["npu"], seconds["cpu"], strict=True))
    print(f"weights {weights / 2**20:.0f} MiB; a forward pass on the NPU added {added / 2**20:.0f} MiB to the process")
    print(f"seconds: NPU {statistics.median(seconds['npu']):.2f}, CPU {statistics.median(seconds['cpu']):.2f}")
    print(f"time on the emulated NPU over time on the CPU: {ratio:.2f}")


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        run(parse_arguments(arguments))


if __name__ == "__main__":
    main()
