"""What the tests of tiers put into them, and threads that do so at once."""

from __future__ import annotations

import random
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ascend import TieredStore
from ascend.tiers import media

SHARED = 10  # keys that all threads read


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != media.LOCK]


def random_tensor(seed: int, size: int) -> torch.Tensor:
    """`size` random bytes as float32, with whatever NaNs are among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).view(torch.float32)


def to_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().resolve_conj().contiguous().view(-1).view(torch.uint8)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(to_bytes(one), to_bytes(other))


def checksum(x: torch.Tensor) -> int:
    return zlib.crc32(to_bytes(x).numpy().data)


def column(store: TieredStore, name: str) -> list[int]:
    """`name` of each tier, from the store's counters."""
    return [tier[name] for tier in store.stats()["tiers"]]


def assert_within_budgets(store: TieredStore) -> None:
    for tier in store.stats()["tiers"]:
        assert tier["used"] <= tier["budget"], tier


def work_in_threads(store: TieredStore, threads: int, operations: int) -> None:
    """Random operations, on keys of each thread's own and on some that all read; the sum of them is `operations`."""
    shared = [random_tensor(seed, size=2048) for seed in range(SHARED)]
    for number, tensor in enumerate(shared):
        store.put(f"shared/{number}", tensor.to(store.device))
    sums = [checksum(tensor) for tensor in shared]
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(_work, store, seed, operations // threads, sums) for seed in range(threads)]:
            done.result()


def _work(store: TieredStore, seed: int, operations: int, shared: list[int]) -> None:
    draw = random.Random(seed)
    sums: dict[str, int] = {}
    for _ in range(operations):
        key = f"{seed}/{draw.randrange(20)}"
        what = draw.choice(["put", "get", "get", "get", "prefetch", "remove", "shared", "stats"])
        if what == "put":
            tensor = torch.frombuffer(bytearray(draw.randbytes(draw.randrange(1, 4000))), dtype=torch.uint8)
            store.put(key, tensor.to(store.device), priority=draw.randrange(3))
            sums[key] = checksum(tensor)
        elif what == "shared":
            number = draw.randrange(SHARED)
            assert checksum(store.get(f"shared/{number}")) == shared[number]
        elif what == "stats":
            assert_within_budgets(store)
        elif key not in sums:
            with pytest.raises(KeyError, match=key):
                store.get(key)
        elif what == "get":
            assert checksum(store.get(key)) == sums[key]
        elif what == "prefetch":
            store.prefetch(draw.sample(sorted(sums), min(3, len(sums))))
        else:
            store.remove(key)
            del sums[key]
    for key, expected in sums.items():
        assert checksum(store.get(key)) == expected
