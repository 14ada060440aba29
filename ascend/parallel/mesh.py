"""The ranks of a run: which share a picture, which prompts each draws, and how they talk.

Ranks talk through torch.distributed's own backends: hccl on NPUs, nccl on CUDA, gloo on CPUs. all_gather is the one
collective, as the two chips of a 310P Duo card have few others and cannot copy to each other. Settings and reports,
which are small and in host memory, go through the store of the rendezvous.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}
BRANCHES = 2  # of guidance: unconditional and conditional
TIMEOUT = timedelta(minutes=30)  # the slowest first step compiles


class ParallelError(RuntimeError):
    """Ranks that cannot work together."""


@dataclass
class Mesh:
    """Who computes what: `data_size` groups of `branch_size` ranks, each group with prompts of its own."""

    rank: int = 0
    world_size: int = 1
    branch_size: int = 1
    group: Any = None  # the ranks that share a batch, None for one
    gathered: int = 0  # how often `gather` was called, which tells the calls apart

    @property
    def branch(self) -> int:
        """This rank's place in its group."""
        return self.rank % self.branch_size

    @property
    def data(self) -> int:
        """Which group this rank is in."""
        return self.rank // self.branch_size

    @property
    def data_size(self) -> int:
        return self.world_size // self.branch_size

    def gather(self, value: Any) -> list[Any] | None:
        """What every rank gave, as JSON makes it, on rank 0; None on the others."""
        text = json.dumps(value)
        if self.world_size == 1:
            return [json.loads(text)]
        store = dist.distributed_c10d._get_default_store()
        self.gathered += 1
        keys = [f"diffusers_npu/{self.gathered}/{rank}" for rank in range(self.world_size)]
        store.set(keys[self.rank], text)
        if self.rank:
            return None
        store.wait(keys, TIMEOUT)
        return [json.loads(store.get(key)) for key in keys]

    def require_same(self, settings: dict[str, Any]) -> None:
        """Compare what decides the pictures with rank 0.

        Raises:
            ParallelError: on every rank, so that none waits for one that has ended, naming what differs.
        """
        everywhere = self.gather(settings)
        differs = self._told_by_rank_0(_first_difference(everywhere) if everywhere else "")
        if differs:
            raise ParallelError(differs)

    def _told_by_rank_0(self, text: str) -> str:
        """What rank 0 has as `text`, on every rank."""
        if self.world_size == 1:
            return text
        store = dist.distributed_c10d._get_default_store()
        key = f"diffusers_npu/{self.gathered}/told"
        if self.rank == 0:
            store.set(key, text)
        store.wait([key], TIMEOUT)
        return str(store.get(key).decode())

    def share(self, count: int) -> range:
        """Which of `count` prompts this rank's group draws."""
        return range(self.data, count, self.data_size)


def _first_difference(settings: list[dict[str, Any]]) -> str:
    """Of the first rank whose settings are not those of rank 0; empty where all are the same."""
    mine = settings[0]
    for rank, others in enumerate(settings):
        different = [name for name in mine if others.get(name) != mine[name]]
        if different:
            changes = (f"{name} is {others.get(name)!r} instead of {mine[name]!r}" for name in different)
            return f"rank {rank} was started with other settings than rank 0: {', '.join(changes)}"
    return ""


def world_size() -> int:
    """How many processes torchrun has started for this program; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def choose_branch_size(ranks: int, has_guidance: bool, wanted: int | None = None) -> int:
    """How many of `ranks` share a picture: `wanted`, else 2 with guidance and 1 without.

    Raises:
        ParallelError: an odd number of ranks cannot be split into pairs, or there is no guidance to share.
    """
    if wanted == BRANCHES and not has_guidance:
        raise ParallelError("--cfg_parallel 2 shares the branches of guidance, and --guidance_scale turns it off")
    if wanted == 1 or ranks == 1 or not has_guidance:
        return 1
    if ranks % BRANCHES:
        raise ParallelError(
            f"{ranks} devices cannot share the two branches of guidance evenly: take an even number of them, or let "
            "each draw pictures of its own with --cfg_parallel 1"
        )
    return BRANCHES


def all_gather(everyone: torch.Tensor, mine: torch.Tensor, group: Any) -> None:
    """Fill `everyone` with the equal shares of all ranks of `group`, in their order."""
    # torch 2.13 renamed it and warns of the old name, the only one of torch 2.10.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(everyone, mine, group=group)


def wait_for_all(mesh: Mesh, device: torch.device) -> None:
    """Hold up `device` until all ranks of the group are here, by the one collective that a 310P Duo card has."""
    all_gather(torch.empty(mesh.branch_size, device=device), torch.zeros(1, device=device), mesh.group)


@contextmanager
def process_group(device: torch.device, branch_size: int) -> Iterator[Mesh]:
    """Join the processes that torchrun started, each with a device of its own, until the end of the block."""
    ranks = world_size()
    if ranks == 1:
        yield Mesh()
        return
    bound = None if device.type == "cpu" else device
    dist.init_process_group(BACKENDS[device.type], timeout=TIMEOUT, device_id=bound)
    try:
        groups = [dist.new_group([*range(first, first + branch_size)]) for first in range(0, ranks, branch_size)]
        rank = dist.get_rank()
        group = groups[rank // branch_size] if branch_size > 1 else None
        mesh = Mesh(rank, ranks, branch_size, group)
        if group is not None:
            # The first collective connects the ranks, for which HCCL has a time limit that no compilation must delay.
            wait_for_all(mesh, device)
        yield mesh
    finally:
        dist.destroy_process_group()
