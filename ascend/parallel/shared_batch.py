"""One picture on several devices: each rank computes its share of the UNet's batch.

With guidance the batch holds an unconditional and a conditional sample of each picture. Two ranks compute one half
each; one all_gather a step brings the predictions together, and guidance and scheduler then run alike on both, so that
the latents never leave their device. More pairs of ranks draw other prompts: `Mesh.data` of `Mesh.data_size`.

Ranks talk through torch.distributed's own backends: hccl on NPUs, nccl on CUDA, gloo on CPUs. all_gather is the one
collective, as the two chips of a 310P Duo card have few others and cannot copy to each other. Settings and reports,
which are small and in host memory, go through the store of the rendezvous.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

from ascend.parallel.agreement import differences, fingerprint

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}
PROMPT = "encoder_hidden_states"  # as the UNet calls it
BRANCHES = 2  # of guidance: unconditional and conditional
TIMEOUT = timedelta(minutes=30)  # the slowest first step compiles

# The arguments of forward with a row for each sample, or one for all, by the class of the module.
BATCHED_ARGUMENTS = {
    "UNet2DConditionModel": {
        "sample",
        "timestep",
        PROMPT,
        "projected_prompt",
        "class_labels",
        "timestep_cond",
        "attention_mask",
        "cross_attention_kwargs[gligen]",
        "added_cond_kwargs",
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
        "encoder_attention_mask",
        "cached_feature",
    },
    "Decoder": {"sample", "latent_embeds"},
}
WHOLE_ARGUMENTS = {"cross_attention_kwargs[ip_adapter_masks]"}  # a row for each adapter
CONSTANT_ARGUMENTS = (PROMPT, "projected_prompt")  # the same objects in all steps of a picture


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
    long as running it on one. All ranks must make the same calls: give each a generator with the same seed, or the
    same latents; what they start a picture with is compared. `unshare_guidance` puts everything back. A second call
    with the same mesh changes nothing; with a mesh of one rank there is nothing to share.

    Raises:
        ParallelError: a component is of a class whose arguments are not known here, is shared with another mesh, or
            its forward was replaced since it was shared.
    """
    if mesh.group is None:
        return
    modules = _shared_modules(pipe)
    for name, module in modules.items():
        shared = _shared_batch(name, module)
        if shared is not None and shared.mesh is not mesh:
            raise ParallelError(f"the {name} is shared by other ranks already: call unshare_guidance first")
        if not _batched_arguments(module):
            raise ParallelError(f"the {name} is a {type(module).__name__}, and it is not known how to share its batch")
    for name, module in modules.items():
        if _shared_batch(name, module) is None:
            shared = SharedBatch(module, mesh, must_split=name == "unet")
            vars(module).update(forward=shared, _shared_batch=shared)


def unshare_guidance(pipe: StableDiffusionPipeline) -> None:
    """Undo `share_guidance`: each rank computes whole batches again. Does nothing where nothing is shared.

    Raises:
        ParallelError: a forward was replaced since it was shared, by offloading for example: undo that first.
    """
    shared = {name: (module, _shared_batch(name, module)) for name, module in _shared_modules(pipe).items()}
    for module, batch in shared.values():
        if batch is not None:
            batch.restore(module)


def _shared_modules(pipe: StableDiffusionPipeline) -> dict[str, nn.Module]:
    return {"unet": pipe.unet, "vae.decoder": pipe.vae.decoder}


def _batched_arguments(module: nn.Module) -> set[str]:
    classes = [kind.__name__ for kind in type(module).__mro__]
    return next((names for kind, names in BATCHED_ARGUMENTS.items() if kind in classes), set())


def _shared_batch(name: str, module: nn.Module) -> SharedBatch | None:
    """What shares the batch of `module`, when something does."""
    shared = vars(module).get("_shared_batch")
    if shared is not None and vars(module).get("forward") is not shared:
        raise ParallelError(f"{name}.forward was replaced after share_guidance: undo that first")
    return shared


class SharedBatch:
    """Calls the forward of `module` with this rank's rows of the batch and gathers the first result of all ranks.

    The batch is the first argument's first dimension. Which other arguments have a row for each sample is declared in
    `BATCHED_ARGUMENTS`; these are split alike, in tuples, lists and dicts too, but for scalars and a single row, which
    is for all samples. Rows are dealt out as evenly as possible, the first ranks get one more.

    Args:
        module: its forward returns a tensor, or a tuple or an output class of one and of tensors that stay with their
            rank.
        must_split: raise ParallelError for fewer rows than ranks; otherwise each rank computes all of them. Such a
            module begins a picture when its prompt is another object than before, and the ranks then compare what
            they were given.
    """

    def __init__(self, module: nn.Module, mesh: Mesh, must_split: bool) -> None:
        self.replaced = vars(module).get("forward")  # None: the method of the class
        self.forward: Callable[..., Any] = module.forward
        self.signature = inspect.signature(types.MethodType(type(module).forward, module))
        self.batched = _batched_arguments(module)
        self.mesh = mesh
        self.must_split = must_split
        self.constant: dict[str, tuple[Any, Any]] = {}  # what is the same in all steps, and this rank's rows of it

    def restore(self, module: nn.Module) -> None:
        """Give `module` the forward that it had."""
        del vars(module)["_shared_batch"], vars(module)["forward"]
        if self.replaced is not None:
            module.forward = self.replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.signature.bind(*args, **kwargs).arguments
        batch = next(iter(arguments.values()))
        if self.must_split:
            self._require_agreement(batch, arguments)
        rows, ranks = len(batch), self.mesh.branch_size
        if rows < ranks:
            if self.must_split:
                raise ParallelError(f"{ranks} devices cannot share a batch of {rows}: there is no guidance to split")
            return self.forward(**arguments)
        results = self.forward(**{name: self._share(name, value, rows) for name, value in arguments.items()})
        if isinstance(results, torch.Tensor):
            return self._gather(results, rows)
        first, *others = results.values() if isinstance(results, dict) else results
        gathered = self._gather(first, rows), *(LocalRows(other, rows) for other in others)
        # An output class of diffusers leaves out what is None.
        return type(results)(**dict(zip(results, gathered, strict=True))) if isinstance(results, dict) else gathered

    def _require_agreement(self, batch: torch.Tensor, arguments: dict[str, Any]) -> None:
        prompts = [arguments.get(name) for name in CONSTANT_ARGUMENTS]
        known = [self.constant.get(name, (None, None))[0] for name in CONSTANT_ARGUMENTS]
        if all(prompt is before for prompt, before in zip(prompts, known, strict=True)):
            return
        self.constant.clear()
        mine = fingerprint(batch, arguments["timestep"], prompts)
        everyone = mine.new_empty(self.mesh.branch_size * len(mine))
        all_gather(everyone, mine, self.mesh.group)
        first = self.mesh.rank - self.mesh.branch
        expected, *others = everyone.view(self.mesh.branch_size, -1).cpu()
        for branch, theirs in enumerate(others, 1):
            different = differences(expected, theirs)
            if different:
                raise ParallelError(
                    f"ranks {first} and {first + branch} cannot share a picture, as their {' and '.join(different)} "
                    "differ: give each rank a generator with the same seed, and the same arguments"
                )

    def _share(self, name: str, value: Any, rows: int) -> Any:
        """This rank's rows of an argument."""
        known = self.constant.get(name)
        if known is not None and value is known[0]:
            return known[1]
        if name == "cross_attention_kwargs" and value:
            return {key: self._share(f"{name}[{key}]", item, rows) for key, item in value.items()}
        share = pytree.tree_map(functools.partial(self._rows_of_tensor, name, rows), value)
        if name in CONSTANT_ARGUMENTS:
            self.constant[name] = value, share
        return share

    def _rows_of_tensor(self, name: str, rows: int, value: Any) -> Any:
        if isinstance(value, LocalRows):
            return value.tensor
        if not isinstance(value, torch.Tensor) or name in WHOLE_ARGUMENTS or value.dim() == 0:
            return value
        if name not in self.batched:
            raise ParallelError(f"{name} holds a tensor, and it is not known whether it has a row for each sample")
        if len(value) not in (1, rows):
            raise ParallelError(f"{name} holds a tensor of {len(value)} rows for a batch of {rows}")
        return value if len(value) < rows else value[slice(*rows_of(rows, self.mesh.branch, self.mesh.branch_size))]

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
