"""One picture on several devices: each rank computes its share of the UNet's batch.

With guidance the batch holds an unconditional and a conditional sample of each picture. Two ranks compute one half
each; one all_gather a step brings the predictions together, and guidance and scheduler then run alike on both, so that
the latents never leave their device. More pairs of ranks draw other prompts: `Mesh.data` of `Mesh.data_size`.

Ranks talk through torch.distributed's own backends: hccl on NPUs, nccl on CUDA, gloo on CPUs. all_gather is the one
collective, as the two chips of a 310P Duo card have few others and cannot copy to each other. Settings and reports,
which are small and in host memory, go through the store of the rendezvous.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}
PROMPT = "encoder_hidden_states"  # as the UNet calls it
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
            ParallelError: on rank 0, naming the ranks and settings that differ.
        """
        everywhere = self.gather(settings) or []
        for rank, others in enumerate(everywhere):
            mine = everywhere[0]
            different = [name for name in mine if others.get(name) != mine[name]]
            if different:
                raise ParallelError(
                    f"rank {rank} was started with other settings than rank 0: "
                    + ", ".join(f"{name} is {others.get(name)!r} instead of {mine[name]!r}" for name in different)
                )

    def share(self, count: int) -> range:
        """Which of `count` prompts this rank's group draws."""
        return range(self.data, count, self.data_size)


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


def share_guidance(pipe: StableDiffusionPipeline, mesh: Mesh) -> None:
    """Let the ranks of a group compute a share of each batch of the UNet and of the VAE decoder of `pipe`.

    Install attention processors, token merging and graphs before. DeepCache works: each rank keeps the cached
    feature of its own samples. All ranks return all pictures. The text encoder runs on every rank, which takes as
    long as running it on one.
    """
    if mesh.group is None:
        return
    pipe.unet.forward = SharedBatch(pipe.unet.forward, mesh, must_split=True)
    pipe.vae.decoder.forward = SharedBatch(pipe.vae.decoder.forward, mesh, must_split=False)


class SharedBatch:
    """Calls `forward` with this rank's rows of the batch and gathers the first result of all ranks.

    The batch is the first dimension of the first argument. Of the other arguments every tensor with as many rows is
    split alike, in tuples and dicts too; all else is handed on as it is. Rows are dealt out as evenly as possible, the
    first ranks get one more.

    Args:
        forward: of a module; returns a tensor, or a tuple of one and of tensors that stay with their rank.
        must_split: raise ParallelError for fewer rows than ranks; otherwise each rank computes all of them.
    """

    def __init__(self, forward: Callable[..., Any], mesh: Mesh, must_split: bool) -> None:
        self.forward = forward
        self.mesh = mesh
        self.must_split = must_split
        self.prompt: tuple[Any, Any] = None, None  # the last whole one, and this rank's rows of it

    def __call__(self, batch: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows, ranks = len(batch), self.mesh.branch_size
        if rows < ranks:
            if self.must_split:
                raise ParallelError(f"{ranks} devices cannot share a batch of {rows}: there is no guidance to split")
            return self.forward(batch, *args, **kwargs)
        mine = slice(*rows_of(rows, self.mesh.branch, ranks))

        def share(value: Any) -> Any:
            if isinstance(value, LocalRows):
                return value.tensor
            is_batched = isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == rows
            return value[mine] if is_batched else value

        prompt = kwargs.pop(PROMPT, None)
        if prompt is not self.prompt[0]:  # its keys and values for every block are the same in all steps
            self.prompt = prompt, pytree.tree_map(share, prompt)
        args, kwargs = pytree.tree_map(share, (args, kwargs))
        if prompt is not None:
            kwargs[PROMPT] = self.prompt[1]
        results = self.forward(batch[mine], *args, **kwargs)
        if isinstance(results, torch.Tensor):
            return self._gather(results, rows)
        return self._gather(results[0], rows), *(LocalRows(result, rows) for result in results[1:])

    def _gather(self, mine: torch.Tensor, rows: int) -> torch.Tensor:
        ranks = self.mesh.branch_size
        most = -(-rows // ranks)
        if len(mine) < most:  # all_gather takes equal shares
            mine = torch.cat([mine, mine.new_zeros(most - len(mine), *mine.shape[1:])])
        everyone = mine.new_empty(ranks * most, *mine.shape[1:])
        all_gather(everyone, mine.contiguous(), self.mesh.group)
        if rows == ranks * most:
            return everyone
        starts = [rows_of(rows, rank, ranks) for rank in range(ranks)]
        return torch.cat([everyone[rank * most :][: stop - start] for rank, (start, stop) in enumerate(starts)])


@dataclass
class LocalRows:
    """A tensor of this rank's rows, as long as the whole batch: what DeepCache hands from one step to the next."""

    tensor: torch.Tensor
    rows: int

    def __len__(self) -> int:
        return self.rows


def rows_of(rows: int, rank: int, ranks: int) -> tuple[int, int]:
    """Where the rows of `rank` start and end."""
    share, more = divmod(rows, ranks)
    start = rank * share + min(rank, more)
    return start, start + share + (rank < more)
