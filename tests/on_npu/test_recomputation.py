"""Activations computed again or kept in host memory for the backward pass: the same gradients to the bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from tests.on_npu.inputs import numbers

Run = Callable[["Block", torch.Tensor], torch.Tensor]


class Block(torch.nn.Module):
    """A product, and a mask that must be the same when it is drawn again."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(numbers((8, 8), torch.float32, seed))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x @ self.weight, 0.5)


def keep_products(context: object, operator: object, *arguments: object, **options: object) -> CheckpointPolicy:
    kept = operator is torch.ops.aten.mm.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def selected() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    return create_selective_checkpoint_contexts(keep_products)


RUNS: dict[str, Run] = {
    "not reentrant": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "reentrant": lambda block, x: checkpoint(block, x, use_reentrant=True),
    "selective": lambda block, x: checkpoint(block, x, use_reentrant=False, context_fn=selected),
    "in two segments": lambda block, x: checkpoint_sequential([block, torch.nn.Identity()], 2, x, use_reentrant=False),
}


def gradients(run: Run, around: AbstractContextManager[object]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Of two blocks in a row, and the state that they leave the generator in."""
    torch.npu.manual_seed(3)
    first, second = Block(0).to("npu"), Block(1).to("npu")
    x = numbers((4, 8), torch.float32, 2).to("npu").requires_grad_()
    with around:
        loss = run(second, run(first, x)).square().sum()
    loss.backward()
    leaves = [x, first.weight, second.weight]
    assert all(leaf.grad is not None for leaf in leaves)
    return [leaf.grad for leaf in leaves if leaf.grad is not None], torch.npu.get_rng_state()


def plain(block: Block, x: torch.Tensor) -> torch.Tensor:
    return block(x)


@pytest.mark.parametrize("name", RUNS)
def test_activations_that_are_computed_again(name: str) -> None:
    expected, state = gradients(plain, nullcontext())
    actual, after = gradients(RUNS[name], nullcontext())
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
    assert torch.equal(after, state)


def test_a_mask_is_another_without_the_state_of_the_generator() -> None:
    expected, _ = gradients(plain, nullcontext())
    actual, _ = gradients(
        lambda block, x: checkpoint(block, x, use_reentrant=False, preserve_rng_state=False), nullcontext()
    )
    assert not torch.equal(actual[0], expected[0])


@pytest.mark.parametrize("pinned", (False, True))
def test_activations_in_host_memory(pinned: bool) -> None:
    expected, _ = gradients(plain, nullcontext())
    actual, _ = gradients(plain, save_on_cpu(pin_memory=pinned, device_type="npu"))
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_what_is_kept_in_host_memory_is_not_on_the_chip() -> None:
    packed: list[torch.Tensor] = []

    class Watched(save_on_cpu):
        def __init__(self) -> None:
            super().__init__(pin_memory=True, device_type="npu")

    hooks = Watched()
    inner = hooks.pack_hook

    def pack(tensor: torch.Tensor) -> object:
        kept = inner(tensor)
        packed.append(kept[1])
        return kept

    gradients(plain, saved_tensors_hooks(pack, hooks.unpack_hook))
    assert packed and all(tensor.device.type == "cpu" and tensor.is_pinned() for tensor in packed)
