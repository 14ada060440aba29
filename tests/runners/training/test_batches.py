"""Which examples a step sees: a function of the seed and the step alone."""

from __future__ import annotations

import pytest
import torch

from runners.training.batches import Batches, draw, share_of


def test_each_example_comes_once_an_epoch_where_batches_are_full() -> None:
    batches = Batches([list(range(12))], 4, seed=0)
    assert batches.steps_per_epoch == 3
    for epoch in range(2):
        seen = [number for step in range(3) for number in batches.of_step(3 * epoch + step)]
        assert sorted(seen) == list(range(12))
    assert batches.of_step(0) != batches.of_step(3)


def test_a_batch_is_of_one_bucket_and_full() -> None:
    buckets = [[0, 1, 2, 3, 4], [5]]
    batches = Batches(buckets, 4, seed=0)
    assert batches.steps_per_epoch == 3
    made = [batches.of_step(step) for step in range(3)]
    assert all(len(batch) == 4 for batch in made)
    assert all(any(set(batch) <= set(bucket) for bucket in buckets) for batch in made)
    assert {number for batch in made for number in batch} == set(range(6))


def test_steps_may_be_asked_in_any_order() -> None:
    forwards = [Batches([list(range(10))], 4, seed=1).of_step(step) for step in range(9)]
    batches = Batches([list(range(10))], 4, seed=1)
    assert [batches.of_step(step) for step in reversed(range(9))] == forwards[::-1]


@pytest.mark.parametrize(("world_size", "parts"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_shares_make_up_the_batch(world_size: int, parts: int) -> None:
    batch = list(range(8))
    places = [
        place
        for part in range(parts)
        for rank in range(world_size)
        for place in share_of(batch, rank, world_size, part, parts)
    ]
    assert sorted(places) == batch


def test_numbers_depend_on_step_and_place() -> None:
    first = draw(0, 3, 1, (4, 8, 8), 1000)
    again = draw(0, 3, 1, (4, 8, 8), 1000)
    assert torch.equal(first.noise, again.noise)
    assert first.timestep == again.timestep
    for other in (draw(1, 3, 1, (4, 8, 8), 1000), draw(0, 4, 1, (4, 8, 8), 1000), draw(0, 3, 2, (4, 8, 8), 1000)):
        assert not torch.equal(first.noise, other.noise)
    assert not torch.equal(first.noise, first.posterior)
