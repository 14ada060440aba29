"""Which examples each step sees and which random numbers they get: functions of the seed and the step alone.

So a resumed training goes on as an uninterrupted one would, and one device sees what several see together.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Batches:
    """The examples of each optimizer's step, all of one bucket, as all have one size.

    An epoch shows each example at least once: where a bucket does not fill its last batch, examples of it come twice.

    Args:
        buckets: the examples' numbers, by bucket; none is empty.
        size: examples of a step, on all devices together.
    """

    def __init__(self, buckets: Sequence[Sequence[int]], size: int, seed: int) -> None:
        self.buckets, self.size, self.seed = buckets, size, seed
        self.steps_per_epoch = sum(-(-len(bucket) // size) for bucket in buckets)
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def of_step(self, step: int) -> list[int]:
        """The examples' numbers, `size` of them."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffle(epoch))
        return self._epoch[1][place]

    def _shuffle(self, epoch: int) -> list[list[int]]:
        rng = random.Random(f"{self.seed}/epoch/{epoch}")
        batches = []
        for bucket in self.buckets:
            order: list[int] = []
            while len(order) < -(-len(bucket) // self.size) * self.size:
                order += rng.sample(bucket, len(bucket))
            batches += [
                order[start : start + self.size]
                for start in range(0, -(-len(bucket) // self.size) * self.size, self.size)
            ]
        rng.shuffle(batches)
        return batches


def share_of(batch: Sequence[int], rank: int, world_size: int, part: int, parts: int) -> range:
    """The places in `batch` that a rank computes in one of the `parts` of gradient accumulation."""
    size = len(batch) // (world_size * parts)
    first = (part * world_size + rank) * size
    return range(first, first + size)


@dataclass(frozen=True)
class Draw:
    """The random numbers of one example in one step, float32 on the CPU, whatever computes with them.

    Attributes:
        timestep: from 0 to the number of training timesteps.
        noise: of the latents' shape [channels, height, width].
        posterior: of the same shape: which latent of the VAE's distribution is taken.
        offset: [channels, 1, 1], for the noise offset.
        uniform: two numbers in [0, 1), which decide on flipping and on leaving out the caption.
    """

    timestep: int
    noise: Tensor
    posterior: Tensor
    offset: Tensor
    uniform: tuple[float, float]


def draw(seed: int, step: int, place: int, shape: Sequence[int], timesteps: int) -> Draw:
    """The numbers of the example at `place` in the batch of `step`, for latents of `shape`."""
    digest = hashlib.sha256(f"{seed}/{step}/{place}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    timestep = int(torch.randint(timesteps, (), generator=generator))
    flip, drop = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    return Draw(
        timestep,
        torch.randn(*shape, generator=generator),
        torch.randn(*shape, generator=generator),
        torch.randn(shape[0], 1, 1, generator=generator),
        (flip, drop),
    )
