"""Random numbers: torch_npu's generator decides, and equal states give equal numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch_npu

from tests.on_npu.helpers import FLOATS, assert_close, reference
from tests.on_npu.inputs import numbers


def _full(value: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((5000,), value, dtype=dtype, device="npu")


DRAWS: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
    "randn": lambda dtype: torch.randn(5000, dtype=dtype, device="npu"),
    "rand": lambda dtype: torch.rand(5000, dtype=dtype, device="npu"),
    "normal_": lambda dtype: torch.empty(5000, dtype=dtype, device="npu").normal_(3, 2),
    "uniform_": lambda dtype: torch.empty(5000, dtype=dtype, device="npu").uniform_(-2, 6),
    "bernoulli_": lambda dtype: torch.empty(5000, dtype=dtype, device="npu").bernoulli_(0.25),
    "bernoulli_ of tensor": lambda dtype: torch.empty(5000, dtype=dtype, device="npu").bernoulli_(_full(0.25, dtype)),
    "normal": lambda dtype: torch.normal(_full(3, dtype), _full(2, dtype)),
    "normal of means": lambda dtype: torch.normal(_full(3, dtype), 2.0),
    "normal of deviations": lambda dtype: torch.normal(3.0, _full(2, dtype)),
    "normal of numbers": lambda dtype: torch.normal(3.0, 2.0, (5000,), dtype=dtype, device="npu"),
    "exponential_": lambda dtype: torch.empty(5000, dtype=dtype, device="npu").exponential_(0.5),
    "npu_sim_exponential_": lambda dtype: torch_npu.npu_sim_exponential_(_full(0, dtype), 0.5),
    "randint": lambda dtype: torch.randint(-3, 4, (5000,), device="npu").to(dtype),
}
MOMENTS = {
    "randn": (0, 1),
    "rand": (0.5, 12**-0.5),
    "normal_": (3, 2),
    "uniform_": (2, 8 * 12**-0.5),
    "bernoulli_": (0.25, 0.75**0.5 / 2),
    "bernoulli_ of tensor": (0.25, 0.75**0.5 / 2),
    **dict.fromkeys(("normal", "normal of means", "normal of deviations", "normal of numbers"), (3, 2)),
    **dict.fromkeys(("exponential_", "npu_sim_exponential_"), (2, 2)),
    "randint": (0, 2),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", DRAWS)
def test_draws(name: str, dtype: torch.dtype) -> None:
    torch.npu.manual_seed(7)
    first, second = DRAWS[name](dtype), DRAWS[name](dtype)
    assert not torch.equal(first, second)
    torch.npu.manual_seed(7)
    assert torch.equal(DRAWS[name](dtype), first)
    mean, deviation = MOMENTS[name]
    assert abs(first.float().mean().item() - mean) < 0.06 * max(deviation, 0.5)
    assert abs(first.float().std().item() - deviation) < 0.04 * deviation


def test_a_generator_has_its_own_state() -> None:
    one, two = (torch.Generator("npu").manual_seed(3) for _ in range(2))
    assert torch.equal(torch.randn(9, device="npu", generator=one), torch.randn(9, device="npu", generator=two))
    state = one.get_state()
    drawn = torch.randn(9, device="npu", generator=one)
    one.set_state(state)
    assert torch.equal(torch.randn(9, device="npu", generator=one), drawn)


def test_permutations_and_choices() -> None:
    torch.npu.manual_seed(0)
    assert torch.randperm(50, device="npu").sort()[0].tolist() == list(range(50))
    chosen = torch.multinomial(torch.tensor([0.0, 0.5, 0.5], device="npu"), 1000, replacement=True)
    assert set(chosen.tolist()) == {1, 2}
    assert set(torch.multinomial(torch.tensor([1.0, 2.0, 3.0], device="npu"), 3).tolist()) == {0, 1, 2}


def test_dropout() -> None:
    x = torch.ones(4096, device="npu")
    kept = torch.nn.functional.dropout(x, 0.25).cpu()
    assert set(kept.unique().tolist()) <= {0.0, 1 / 0.75} or torch.allclose(kept[kept > 0], torch.tensor(1 / 0.75))
    assert abs((kept > 0).float().mean().item() - 0.75) < 0.03
    assert torch.equal(torch.nn.functional.dropout(x, 0.25, training=False), x)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_gradient_of_dropout_has_its_mask(dtype: torch.dtype) -> None:
    x = numbers((33, 70), dtype, low=1, high=2)  # no multiple of the mask's 128 bits
    for drop in (torch.nn.Dropout(0.25), lambda x: torch.native_dropout(x, 0.25, True)[0]):
        there = x.to("npu").requires_grad_()
        torch.npu.manual_seed(5)
        kept = drop(there)
        kept.sum().backward()
        assert there.grad is not None
        factors = torch.where(kept.detach().cpu() == 0, 0.0, 1 / 0.75)
        assert_close(there.grad, factors)
        assert_close(kept.detach(), reference(x) * factors)
        torch.npu.manual_seed(5)
        assert torch.equal(drop(there), kept)
        assert not torch.equal(drop(there), kept)


def test_dropout_of_all_and_nothing() -> None:
    x = numbers((4, 9), torch.float32).to("npu").requires_grad_()
    for share, factor in ((0.0, 1.0), (1.0, 0.0)):
        x.grad = None
        kept = torch.nn.functional.dropout(x, share)
        kept.sum().backward()
        assert torch.equal(kept, x * factor) and x.grad is not None and torch.equal(x.grad, torch.full_like(x, factor))


def test_the_state_of_a_device() -> None:
    torch.npu.manual_seed_all(1)
    states = torch.npu.get_rng_state_all()
    assert len(states) == torch.npu.device_count()
    first = [torch.randn(9, device="npu"), torch.nn.functional.dropout(torch.ones(99, device="npu"))]
    with torch.random.fork_rng(devices=[0], device_type="npu"):
        torch.randn(7, device="npu")
    after = torch.randn(9, device="npu")
    torch.npu.set_rng_state(states[0])
    assert torch.equal(torch.npu.get_rng_state(), states[0])
    for drawn in first:
        again = (
            torch.randn(9, device="npu")
            if len(drawn) == 9
            else torch.nn.functional.dropout(torch.ones(99, device="npu"))
        )
        assert torch.equal(again, drawn)
    assert torch.equal(torch.randn(9, device="npu"), after)


@pytest.mark.skipif(torch.npu.device_count() < 2, reason="needs two chips")
def test_each_device_has_a_state_of_its_own() -> None:
    torch.npu.manual_seed_all(1)
    state = torch.npu.get_rng_state("npu:1")
    torch.randn(9, device="npu:0")
    assert torch.equal(torch.npu.get_rng_state("npu:1"), state)
    drawn = torch.randn(9, device="npu:1")
    torch.npu.set_rng_state(state, "npu:1")
    assert torch.equal(torch.randn(9, device="npu:1"), drawn)
    torch.npu.manual_seed_all(1)
    assert torch.equal(torch.randn(9, device="npu:0").cpu(), drawn.cpu())
