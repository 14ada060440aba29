"""What each rank does for check_npu_setup.py: one all_gather; rank 0 prints the seconds that a second one takes."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ascend.device import DeviceManager
from ascend.parallel.mesh import BACKENDS, all_gather


def gather(kind: str) -> None:
    """Exchange latents between the ranks on devices of type `kind`."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    manager = DeviceManager(f"{kind}:{os.environ['LOCAL_RANK']}")
    torch.distributed.init_process_group(BACKENDS[kind], device_id=manager.device)
    mine = torch.full((2, 4, 64, 64), float(rank), device=manager.device)  # the latents of a picture
    everyone = mine.new_empty(ranks * len(mine), *mine.shape[1:])
    all_gather(everyone, mine, torch.distributed.group.WORLD)  # connects
    manager.synchronize()
    start = time.perf_counter()
    all_gather(everyone, mine, torch.distributed.group.WORLD)
    manager.synchronize()
    seconds = time.perf_counter() - start
    for other, share in enumerate(everyone.cpu().chunk(ranks)):
        if not bool((share == other).all()):
            sys.exit(f"error: rank {rank} got {share.flatten()[0].item()} from rank {other} instead of {other}.0")
    torch.distributed.destroy_process_group()
    if rank == 0:
        print(seconds)


if __name__ == "__main__":
    gather(sys.argv[1])
