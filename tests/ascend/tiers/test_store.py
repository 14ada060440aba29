"""Tensors that go down through tiers and come back: nothing is lost, and no budget is exceeded on the way.

Several tests are named after what the stack that this store replaces did instead.
"""

from __future__ import annotations

import random
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ascend import Tier, TieredStore
from ascend.device import DeviceError
from ascend.tiers import TierError, default_store, media, streams
from tests.tier_work import assert_within_budgets, column, files, random_tensor, same_bits, work_in_threads

KIB, MIB = 2**10, 2**20


@pytest.fixture
def peaks(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """The most bytes there ever were at once, measured from tensors that live and files that are there."""
    most = {"memory": 0, "files": 0}
    sizes: list[tuple[weakref.ref[torch.Tensor], int]] = []
    empty, write = media.Memory.empty, media.Folder.write

    def measured_empty(self: media.Memory, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        tensor = empty(self, shape, dtype)
        sizes.append((weakref.ref(tensor), tensor.nbytes))
        most["memory"] = max(most["memory"], sum(size for reference, size in sizes if reference() is not None))
        return tensor

    def measured_write(self: media.Folder, tensor: torch.Tensor) -> media.OnDisk:
        written = write(self, tensor)
        most["files"] = max(most["files"], sum(path.stat().st_size for path in files(self.path)))
        return written

    monkeypatch.setattr(media.Memory, "empty", measured_empty)
    monkeypatch.setattr(media.Folder, "write", measured_write)
    yield most


def test_of_ten_tensors_in_a_tier_for_four_none_is_dropped(tmp_path: Path, peaks: dict[str, int]) -> None:
    tensors = [random_tensor(seed, 256 * KIB) for seed in range(10)]
    with TieredStore([Tier("cpu", MIB), Tier(tmp_path, 2 * MIB)]) as store:
        for number, tensor in enumerate(tensors):
            store.put(str(number), tensor)
            assert_within_budgets(store)
            assert len(files(tmp_path)) == max(0, number - 3)
        assert column(store, "tensors") == [4, 6]
        for number in random.Random(0).choices(range(10), k=40):
            assert same_bits(store.get(str(number)), tensors[number])
            assert_within_budgets(store)
            assert column(store, "tensors") == [4, 6] and len(files(tmp_path)) == 6
    assert peaks["memory"] == MIB  # it was full, and never more than that
    assert 6 * 256 * KIB < peaks["files"] <= 2 * MIB


def test_four_threads_share_a_store(tmp_path: Path) -> None:
    with TieredStore([Tier("cpu", 32 * KIB), Tier("cpu", 64 * KIB), Tier(tmp_path, MIB)]) as store:
        work_in_threads(store, threads=4, operations=10_000)
        assert all(column(store, "hits"))
        assert len(files(tmp_path)) == column(store, "tensors")[2]
        assert_within_budgets(store)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5),
        torch.empty(0, 4),
        torch.tensor([True, False]),
        torch.arange(24, dtype=torch.bfloat16).reshape(2, 3, 4),
        torch.arange(24.0).reshape(4, 6).t(),
        torch.arange(24.0)[1::3],
        torch.ones(3, 5, dtype=torch.float8_e4m3fn),
        torch.tensor([1 - 2j, 0.5j, -3 + 1j]).conj(),
        torch.arange(6, dtype=torch.float32).expand(3, 6),
        torch.tensor([float("nan"), -0.0, float("inf")]),
    ],
    ids=str,
)
def test_what_comes_back_from_a_file_is_what_was_put(tmp_path: Path, tensor: torch.Tensor) -> None:
    with TieredStore([Tier(tmp_path, MIB)]) as store:
        store.put("x", tensor)
        back = store.get("x")
    assert (back.dtype, back.shape, back.device) == (tensor.dtype, tensor.shape, tensor.device)
    assert same_bits(back, tensor)


def test_a_disk_tier_is_files_and_not_a_label(tmp_path: Path) -> None:
    x = torch.arange(24, dtype=torch.float16).reshape(2, 3, 4)
    with TieredStore([Tier("cpu", 8), Tier(tmp_path, MIB)]) as store:
        store.put("too large for the first tier", x)
        (file,) = files(tmp_path)
        assert torch.equal(load_file(file)["tensor"], x)
        assert file.stat().st_size == store.stats()["tiers"][1]["used"]
    assert not list(tmp_path.iterdir())


def test_a_store_that_is_forgotten_leaves_no_files(tmp_path: Path) -> None:
    store = TieredStore([Tier(tmp_path, MIB)])
    store.put("x", torch.ones(3))
    assert files(tmp_path)
    del store
    assert not list(tmp_path.iterdir())


def test_a_key_that_is_put_again_does_not_count_twice(tmp_path: Path) -> None:
    with TieredStore([Tier("cpu", 3000), Tier(tmp_path, 10 * KIB)]) as store:
        for value in range(3):
            store.put("x", torch.full((250,), float(value)))
        assert column(store, "used") == [1000, 0]
        assert torch.equal(store.get("x"), torch.full((250,), 2.0))
        store.put("x", torch.ones(750))  # the first goes to a file, until the new one is kept
        assert column(store, "used") == [3000, 0] and not files(tmp_path)
        store.remove("x")
        assert column(store, "used") == [0, 0]


def test_priority_and_then_use_decide_what_goes_down(tmp_path: Path) -> None:
    with TieredStore([Tier("cpu", 3 * KIB), Tier(tmp_path, MIB)]) as store:

        def put(key: str, priority: float) -> None:
            store.put(key, torch.full((256,), float(ord(key))), priority)

        put("a", 1)
        put("b", 0)
        put("c", 0)
        store.get("b")
        put("d", 1)  # c goes down: no more important than b, and used before it
        for key in "abd":
            store.get(key)
        assert column(store, "hits") == [4, 0]
        store.get("c")  # b goes down: it was used after c, but is less important than a and d
        for key in "ad":
            store.get(key)
        assert column(store, "hits") == [6, 1]
        store.get("b")
        assert column(store, "hits") == [6, 2]


def test_a_hit_brings_a_tensor_up_and_others_down_through_every_tier(tmp_path: Path) -> None:
    with TieredStore([Tier("cpu", 1000), Tier("cpu", 1000), Tier(tmp_path, MIB)]) as store:
        for key in "abc":
            store.put(key, torch.full((250,), float(ord(key))))
        assert column(store, "tensors") == [1, 1, 1]
        assert store.stats()["demotions"] == 3  # a twice, b once
        assert store.get("a")[0] == ord("a")
        stats = store.stats()
        assert column(store, "tensors") == [1, 1, 1] and column(store, "hits") == [0, 0, 1]
        assert (stats["promotions"], stats["demotions"], stats["unpromoted"]) == (1, 5, 0)
        assert stats["bytes_moved"] == 6 * 1000
        assert store.get("a")[0] == ord("a")
        assert column(store, "hits") == [1, 0, 1] and store.stats()["bytes_moved"] == 6 * 1000


def test_counters_count_what_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with TieredStore([Tier("cpu", 1000), Tier(tmp_path, MIB)]) as store:
        store.put("x", torch.ones(250))
        with pytest.raises(KeyError, match="the store holds no 'y'"):
            store.get("y")
        assert store.stats()["misses"] == 1 and column(store, "hits") == [0, 0]
        store.put("y", torch.ones(250))
        copy_to = media.OnDisk.copy_to
        monkeypatch.setattr(media.OnDisk, "copy_to", lambda *args: (time.sleep(0.1), copy_to(*args)))
        assert store.stats()["seconds_waited"] == 0
        store.get("x")
        assert 0.1 <= store.stats()["seconds_waited"] < 1


def test_prefetched_tensors_are_hits_of_the_first_tier(tmp_path: Path) -> None:
    with TieredStore([Tier("cpu", 3000), Tier(tmp_path, MIB)]) as store:
        for key in "abcdef":
            store.put(key, torch.full((250,), float(ord(key))))
        store.prefetch("abcd")  # of which three fit, and do not push out each other
        assert store.stats()["promotions"] == 3
        assert [store.get(key)[0] for key in "abc"] == [97, 98, 99]
        assert column(store, "hits") == [3, 0]
        with pytest.raises(KeyError, match="the store holds no 'x'"):
            store.prefetch(["d", "x"])
        assert store.stats()["promotions"] == 3


class Copying:
    """An event after a copy that goes on until somebody waits for it."""

    waits = 0

    def query(self) -> bool:
        return bool(self.waits)

    def synchronize(self) -> None:
        self.waits += 1


def test_what_a_copy_still_reads_counts_until_the_copy_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    with TieredStore([Tier("cpu", 2000), Tier("cpu", 1000)]) as store:
        for key in "abc":
            store.put(key, torch.full((250,), float(ord(key))))
        store.remove("c")
        copying = Copying()
        with monkeypatch.context() as patch:
            patch.setattr(streams.CopyStream, "record", lambda _: copying)
            store.prefetch("a")
        assert column(store, "used") == [2000, 1000] and column(store, "tensors") == [2, 0]
        assert store.get("a")[0] == ord("a") and copying.waits == 0  # which the device waits for, not the host
        store.put("d", torch.ones(250))  # b has to go down to where a is read from
        assert copying.waits == 1
        assert column(store, "used") == [2000, 1000] and column(store, "tensors") == [2, 1]


def test_what_fits_nowhere_is_one_error_and_moves_nothing(tmp_path: Path) -> None:
    with TieredStore([Tier("cpu", 1000), Tier("cpu", 2000), Tier(tmp_path, 1500)]) as store:
        for key in "abcd":
            store.put(key, torch.full((250,), float(ord(key))))
        before = store.stats()
        for size in (250, 1000):
            message = f"'x' fits in no tier: cpu has 0 of 1000 bytes free and {4 * size} are needed, cpu has 0 of 2000"
            with pytest.raises(TierError, match=message):
                store.put("x", torch.ones(size))
        with pytest.raises(TierError, match="'a' fits in no tier"):
            store.put("a", torch.ones(250))  # and the first a is still there
        assert store.stats() == before
        for key in "abcd":  # a full store has no room to swap in, and hands out copies
            assert store.get(key)[0] == ord(key)
            assert_within_budgets(store)
        assert store.stats()["unpromoted"] > 0
        store.remove("b")
        store.put("x", torch.ones(250))


def test_a_tensor_that_cannot_go_down_does_not_stop_others(tmp_path: Path) -> None:
    with TieredStore([Tier("cpu", 3000), Tier("cpu", 1000)]) as store:
        store.put("large", torch.ones(500))
        store.put("small", torch.ones(250))
        store.put("new", torch.ones(250))  # large was used first, but has nowhere to go
        store.get("large")
        store.get("new")
        assert column(store, "tensors") == [2, 1] and column(store, "hits") == [2, 0]


def test_a_store_keeps_copies_and_not_aliases() -> None:
    x = torch.zeros(250)
    with TieredStore([Tier("cpu", 1000)]) as store:
        store.put("x", x)
        x.fill_(1)
        assert store.get("x").sum() == 0
        assert store.get("x").data_ptr() == store.get("x").data_ptr() != x.data_ptr()


def test_weights_from_a_store_have_the_gradients_of_a_linear_layer(tmp_path: Path) -> None:
    layers = [torch.nn.Linear(16, 16, bias=False) for _ in range(4)]
    x = torch.randn(2, 16)
    with TieredStore([Tier("cpu", 2 * KIB), Tier(tmp_path, MIB)]) as store:
        with pytest.raises(ValueError, match="requires gradients.*put its .detach()"):
            store.put("0", layers[0].weight)
        for number, layer in enumerate(layers):
            store.put(str(number), layer.weight.detach())
        weights, output = [], x
        for number in range(4):  # each pushes out another, which the graph of gradients still needs
            weights.append(store.get(str(number)).requires_grad_())
            output = torch.nn.functional.linear(output, weights[-1])
            assert not store.get(str(number)).requires_grad
    output.sum().backward()
    torch.nn.Sequential(*layers)(x).sum().backward()
    for weight, layer in zip(weights, layers, strict=True):
        assert weight.grad is not None and layer.weight.grad is not None
        assert torch.equal(weight.grad, layer.weight.grad)


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        ([], "at least one tier"),
        ([Tier("cpu", 0)], "the tier cpu has a budget of 0 bytes"),
        ([Tier(Path("x"), 8), Tier("cpu", 8)], "the tier x is a folder, which can only be the last"),
        ([Tier("cpu", 8, pinned=True)], "the tier cpu cannot be pinned"),
    ],
)
def test_tiers_that_make_no_sense(tiers: list[Tier], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TieredStore(tiers)


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(DeviceError, match="device 'tpu' is unknown"):
        TieredStore([Tier("tpu", 8)])


def test_tensors_without_plain_values_are_refused(tmp_path: Path) -> None:
    with TieredStore([Tier("cpu", KIB), Tier(tmp_path, KIB)]) as store:
        for tensor in (torch.eye(3).to_sparse(), torch.empty(3, device="meta")):
            with pytest.raises(ValueError, match="put a dense one that has values"):
                store.put("x", tensor)
        with pytest.raises(ValueError, match="hold no torch.complex128: convert the tensor, or leave out the folder"):
            store.put("x", torch.ones(3, dtype=torch.complex128))
        assert column(store, "tensors") == [0, 0]


def test_the_default_store_of_the_cpu(tmp_path: Path) -> None:
    with default_store(torch.device("cpu"), tmp_path) as store:
        assert column(store, "budget") == [4000 * MIB, 16000 * MIB]
        store.put("x", torch.ones(3))
        assert store.get("x").sum() == 3


def test_a_store_that_is_closed_says_so() -> None:
    store = TieredStore([Tier("cpu", KIB)])
    store.close()
    store.close()
    with pytest.raises(TierError, match="closed"):
        store.get("x")
