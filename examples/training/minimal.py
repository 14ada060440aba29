"""The least that trains: a seed, a device, a preset, a small network, and a loop of five lines.

    python examples/training/minimal.py
    python examples/training/minimal.py --device cpu

Every weight gets a gradient and moves, and the loss falls, which is printed; if not, the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from runners.startup import prepare


def main() -> None:
    import torch
    from torch import nn

    from ascend.device import DeviceManager
    from ascend.device.manager import set_seed
    from processors import enable
    from runners.cli import ArgumentParser, fail, one_line_errors

    parser = ArgumentParser(
        prog="minimal.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", metavar="NAME", help="npu, cuda or cpu (the best there is)")
    with one_line_errors():
        device = DeviceManager(parser.parse_args().device).device

        set_seed(0)
        inputs, targets = torch.randn(64, 16, device=device), torch.randn(64, 4, device=device)
        network = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4)).to(device).train()
        before = [weight.detach().clone() for weight in network.parameters()]
        print(enable(network, "balanced"))

        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
        losses = []
        for _ in range(50):
            loss = nn.functional.mse_loss(network(inputs).float(), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())

        first, last = losses[0].item(), losses[-1].item()
        moved = sum(not torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))
        print(f"loss {first:.3f} -> {last:.3f} on {device}; {moved} of {len(before)} tensors moved")
        if moved < len(before) or last >= first:
            fail("the network does not learn", 1)


if __name__ == "__main__":
    prepare()
    main()
