"""The ranks of `test_data_parallel_training.py`: python training_ranks.py training SIZE DIRECTORY."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from tests.on_npu import hccl_ranks
from tests.on_npu.hccl_ranks import Results
from tests.on_npu.inputs import numbers

STEPS, HALVES, BATCH, WIDTH = 3, 2, 4, 10  # no width that two ranks share evenly: 5 and 5 of 10, but 8 and 7 of 15
Model = torch.nn.Module
Optimizer = Callable[..., torch.optim.Optimizer]
Weights = dict[str, torch.Tensor]


class Block(Model):
    """Products, a sum and a square: their backward passes need no operators of their own."""

    def __init__(self, width: int, hidden: int, seed: int) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(width, hidden), torch.nn.Linear(hidden, width)
        for index, weight in enumerate(self.parameters()):
            weight.data.copy_(numbers(weight.shape, torch.float32, 10 * seed + index, low=-0.5, high=0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x)
        return x + self.down(hidden * hidden)


def make_model() -> Model:
    return torch.nn.Sequential(Block(WIDTH, 15, 0), Block(WIDTH, 8, 1))


def data_of(rank: int, step: int, half: int) -> torch.Tensor:
    return numbers((BATCH, WIDTH), torch.float32, 1000 + 100 * rank + HALVES * step + half, low=-1, high=1)


def loss_of(model: Model, x: torch.Tensor) -> torch.Tensor:
    return model(x).float().square().mean() / HALVES


# The first feels the scale of gradients, the second has states that are as large as the weights.
SGD: Optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAMW: Optimizer = partial(torch.optim.AdamW, lr=0.01)


def train_alone(ranks: int, optimizer: Optimizer = SGD, max_norm: float | None = None) -> Weights:
    """What `ranks` processes come to together, on the CPU."""
    model = make_model()
    steps = optimizer(model.parameters())
    for step in range(STEPS):
        steps.zero_grad()
        for rank in range(ranks):
            for half in range(HALVES):
                (loss_of(model, data_of(rank, step, half)) / ranks).backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        steps.step()
    return dict(model.state_dict())


def halves(rank: int, step: int) -> Iterator[tuple[bool, torch.Tensor]]:
    """The parts of a step's batch, and whether gradients are exchanged after it."""
    for half in range(HALVES):
        yield half == HALVES - 1, data_of(rank, step, half).to("npu")


def to_cpu(state: dict[str, Any]) -> Weights:
    return {name.removeprefix("module."): tensor.detach().cpu() for name, tensor in state.items()}


def replicated(rank: int, *, compress: bool = False, sharded: bool = False, **options: Any) -> Weights:
    """DistributedDataParallel, whose gradients travel in several buckets, once for two halves of a batch."""
    model = make_model().to("npu")
    if rank > 0 and options.get("init_sync", True):
        for weight in model.parameters():
            weight.data.zero_()  # rank 0 sends its own
    if options.get("find_unused_parameters"):
        model.register_parameter("unused", torch.nn.Parameter(torch.zeros(3, device="npu")))
    parallel = DistributedDataParallel(model, device_ids=[rank], bucket_cap_mb=0.001, **options)
    if compress:
        parallel.register_comm_hook(None, fp16_compress_hook)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), ADAMW) if sharded else SGD(model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        for last, x in halves(rank, step):
            with nullcontext() if last or options.get("static_graph") else parallel.no_sync():
                loss_of(parallel, x).backward()
        optimizer.step()
    return {name: weight for name, weight in to_cpu(model.state_dict()).items() if name != "unused"}


def fully_sharded(
    *, policy: MixedPrecisionPolicy | None = None, reshard: bool = True, offload: bool = False
) -> FSDPModule:
    mesh = init_device_mesh("npu", (dist.get_world_size(),))
    model = make_model() if offload else make_model().to("npu")
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": reshard}
    if policy is not None:
        options["mp_policy"] = policy
    if offload:
        options["offload_policy"] = CPUOffloadPolicy()
    for block in model.children():
        fully_shard(block, **options)
    return fully_shard(model, **options)


def train_sharded(
    rank: int,
    model: FSDPModule,
    optimizer: Optimizer = SGD,
    max_norm: float | None = None,
    steps: Iterable[int] = range(STEPS),
) -> torch.optim.Optimizer:
    made = optimizer(model.parameters())
    for step in steps:
        made.zero_grad()
        for last, x in halves(rank, step):
            model.set_requires_gradient_sync(last)
            loss_of(model, x).backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        made.step()
    return made


def whole(model: FSDPModule) -> Weights:
    """All weights, on rank 0; nothing on the others."""
    return to_cpu(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)))


def sharded(rank: int, optimizer: Optimizer = SGD, max_norm: float | None = None, **options: Any) -> Weights:
    model = fully_sharded(**options)
    train_sharded(rank, model, optimizer, max_norm)
    return whole(model)


def saved_and_loaded(rank: int) -> Weights:
    """A step less, to files and back into another model, and the last step."""
    directory = Path(sys.argv[3]) / "checkpoint"
    model = fully_sharded()
    optimizer = train_sharded(rank, model, ADAMW, steps=range(STEPS - 1))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=directory)

    again = fully_sharded()
    resumed = ADAMW(again.parameters())
    weights, state = get_state_dict(again, resumed)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=directory)
    set_state_dict(again, resumed, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    for last, x in halves(rank, STEPS - 1):
        again.set_requires_gradient_sync(last)
        loss_of(again, x).backward()
    resumed.step()
    return whole(again)


def from_rank_0(rank: int) -> Weights:
    """Whole weights that rank 0 alone has become everybody's shards."""
    model = fully_sharded()
    given = {name: tensor + 1 for name, tensor in make_model().state_dict().items()} if rank == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, given, options=options)
    return whole(model)


def states_of_the_optimizer(rank: int) -> dict[str, Any]:
    model = fully_sharded()
    optimizer = train_sharded(rank, model, ADAMW, steps=range(1))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    return {name: values["exp_avg"].shape for name, values in state.get("state", {}).items()}


REPLICATED: dict[str, dict[str, Any]] = {
    "plain": {},
    "no broadcast": {"init_sync": False, "find_unused_parameters": True},  # all that 310P can
    "views of buckets": {"gradient_as_bucket_view": True},
    "unused parameters": {"find_unused_parameters": True},
    "static graph": {"static_graph": True},
    "compressed": {"compress": True},
    "sharded optimizer": {"sharded": True},
}
SHARDED: dict[str, dict[str, Any]] = {
    "plain": {},
    "kept after the forward pass": {"reshard": False},
    "AdamW": {"optimizer": ADAMW},
    "fused AdamW": {"optimizer": partial(ADAMW, fused=True)},
    "clipped": {"max_norm": 0.1},
    "offloaded": {"offload": True},
    "bfloat16": {"policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    "float16": {"policy": MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float16)},
}
STATES: dict[str, Callable[[int], Any]] = {
    "saved and loaded": saved_and_loaded,
    "from rank 0": from_rank_0,
    "states of the optimizer": states_of_the_optimizer,
}


def attempt(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return str(error)


def training(rank: int, size: int) -> Results:
    results: Results = {}
    for name, options in REPLICATED.items():
        results["replicated", name] = attempt(partial(replicated, rank, **options))
    for name, options in SHARDED.items():
        results["sharded", name] = attempt(partial(sharded, rank, **options))
    for name, call in STATES.items():
        results["states", name] = attempt(partial(call, rank))
    return results


if __name__ == "__main__":
    hccl_ranks.main([training])
