"""Tensors that leave the NPU's memory for the host's and for files, and come back."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig

from ascend import AdapterStore, Tier, TieredStore
from ascend.tiers import default_store
from tests.tier_work import assert_within_budgets, column, random_tensor, same_bits, work_in_threads

KIB, MIB = 2**10, 2**20


@pytest.fixture
def peak(npu: torch.device) -> Callable[[], int]:
    """The most bytes of the NPU that tensors had at once, above what they had at first, since the last call."""
    torch.npu.synchronize()
    before = torch.npu.memory_allocated(npu)
    torch.npu.reset_peak_memory_stats(npu)

    def read() -> int:
        most = torch.npu.max_memory_allocated(npu) - before
        torch.npu.reset_peak_memory_stats(npu)
        return most

    return read


def tiers(npu: torch.device, folder: Path, *budgets: int) -> list[Tier]:
    return [Tier(npu, budgets[0]), Tier("cpu", budgets[1], pinned=True), Tier(folder, budgets[2])]


def test_ten_tensors_never_take_more_of_the_npu_than_its_budget(
    npu: torch.device, tmp_path: Path, peak: Callable[[], int]
) -> None:
    tensors = [random_tensor(seed, 256 * KIB) for seed in range(10)]
    peaks = []
    with TieredStore(tiers(npu, tmp_path, MIB, MIB, 2 * MIB)) as store:
        for number, tensor in enumerate(tensors):
            store.put(str(number), tensor)
            assert_within_budgets(store)
            peaks.append(peak())
        assert column(store, "tensors") == [3, 4, 3]  # not four: torch_npu pads each
        assert len(list(tmp_path.rglob("*.safetensors"))) == 3
        for number in random.Random(0).choices(range(10), k=40):
            back = store.get(str(number))
            assert back.device == npu and same_bits(back, tensors[number])
            del back
            assert_within_budgets(store)
            peaks.append(peak())
        assert all(column(store, "hits")) and column(store, "tensors") == [3, 4, 3]
    assert 3 * 256 * KIB <= max(peaks) <= MIB
    assert not list(tmp_path.iterdir())


def test_small_tensors_count_as_what_the_allocator_takes(
    npu: torch.device, tmp_path: Path, peak: Callable[[], int]
) -> None:
    with TieredStore(tiers(npu, tmp_path, 4 * KIB, KIB, MIB)) as store:
        for number in range(50):
            store.put(str(number), torch.full((25,), float(number)))
        assert peak() == 4 * KIB and column(store, "tensors") == [8, 10, 32]
        assert [store.get(str(number))[0].item() for number in range(50)] == list(range(50))
        assert peak() <= 4 * KIB + 512  # and what `item` reads


def test_tensors_of_the_npu_come_back_to_the_bit(npu: torch.device, tmp_path: Path) -> None:
    sources = [
        torch.arange(24, dtype=torch.float16, device=npu).reshape(4, 6).t(),
        torch.arange(24, dtype=torch.bfloat16).reshape(2, 3, 4).to(npu),
        torch.arange(24, dtype=torch.int64, device=npu)[1::3],
        torch.tensor([True, False], device=npu),
        torch.tensor(float("nan"), device=npu),
        torch.empty(0, 4, device=npu),
    ]
    for budgets in ((MIB, MIB, MIB), (1, MIB, MIB), (1, 1, MIB)):  # nothing fits into one byte
        with TieredStore(tiers(npu, tmp_path, *budgets)) as store:
            for number, source in enumerate(sources):
                store.put(str(number), source)
            for number, source in enumerate(sources):
                back = store.get(str(number))
                assert (back.device, back.dtype, back.shape) == (npu, source.dtype, source.shape)
                assert same_bits(back, source)
            assert store.stats()["unpromoted"] == (0 if budgets[0] > 1 else 6)


def test_four_threads_share_a_store(npu: torch.device, tmp_path: Path) -> None:
    with TieredStore(tiers(npu, tmp_path, 32 * KIB, 64 * KIB, MIB)) as store:
        work_in_threads(store, threads=4, operations=2000)
        assert all(column(store, "hits"))


def test_the_caller_computes_on_what_is_still_being_copied(npu: torch.device, tmp_path: Path) -> None:
    """With `emulator run --asynchronous` a wait that is missing shows: on the way in, and before memory is reused."""
    size = 2 * MIB
    weights = [torch.randint(0, 9, (size // 4,)).float() for _ in range(6)]
    with TieredStore(tiers(npu, tmp_path, 2 * size, 4 * size, 6 * size)) as store:
        for number, weight in enumerate(weights):
            store.put(str(number), (weight.to(npu) + 1) - 1)  # whose last operation may still run
        for _ in range(3):
            sums = []
            for number in range(6):
                store.prefetch([str(number), str((number + 1) % 6)])
                weight = store.get(str(number))
                sums.append((weight * 2 - weight).sum())
                del weight
            assert [total.item() for total in sums] == [weight.sum().item() for weight in weights]
        assert store.stats()["promotions"] > 0


def keep_busy(npu: torch.device) -> torch.Tensor:
    """A zero that the caller's stream has computed after a while."""
    x = torch.ones(900, 900, device=npu)
    for _ in range(8):
        x = x @ x * 0
    return x.sum()


def test_a_tensor_may_be_put_before_it_is_computed(npu: torch.device) -> None:
    with TieredStore([Tier(npu, 5 * MIB)]) as store:
        store.put("x", torch.full((MIB,), 3.0, device=npu) + keep_busy(npu))
        assert store.get("x").eq(3).all().item()


def test_a_pinned_tensor_may_be_changed_after_it_was_put(npu: torch.device) -> None:
    pinned = torch.zeros(MIB).pin_memory()
    with TieredStore([Tier(npu, 5 * MIB)]) as store:
        store.put("busy", keep_busy(npu))  # so that the next copy has to wait
        store.put("x", pinned)
        pinned.fill_(1)
        assert store.get("x").eq(0).all().item()


def test_memory_that_the_caller_still_reads_is_not_filled_anew(npu: torch.device) -> None:
    with TieredStore([Tier(npu, 5 * MIB)]) as store:
        store.put("x", torch.full((MIB,), 3.0))
        zero = keep_busy(npu)
        read = store.get("x") + zero
        store.remove("x")
        store.put("y", torch.full((MIB,), 4.0))
        assert read.eq(3).all().item() and store.get("y").eq(4).all().item()


def test_the_default_store_of_an_npu(npu: torch.device, tmp_path: Path) -> None:
    with default_store(npu, tmp_path) as store:
        assert column(store, "budget") == [2000 * MIB, 8000 * MIB, 32000 * MIB]
        assert [tier.pinned for tier in store.tiers] == [False, True, False]


def test_accelerators_are_first_and_not_pinned(npu: torch.device) -> None:
    with pytest.raises(ValueError, match="the tier npu:0 is an accelerator, which can only be the first"):
        TieredStore([Tier("cpu", MIB), Tier("npu:0", MIB)])
    with pytest.raises(ValueError, match="the tier npu:0 cannot be pinned"):
        TieredStore([Tier("npu:0", MIB, pinned=True)])


def test_adapters_come_from_the_tiers_as_they_went(
    npu: torch.device, tiny_sd: StableDiffusionPipeline, tmp_path: Path
) -> None:
    tiny_sd.to(npu)
    pictures = {}
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        tiny_sd.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "proj_in"], init_lora_weights=False), name)
        tiny_sd.set_adapters([name])
        pictures[name] = draw(tiny_sd)
    assert not torch.equal(pictures["a"], pictures["b"])
    with TieredStore(tiers(npu, tmp_path, 8 * KIB, 16 * KIB, MIB)) as store:
        adapters = AdapterStore(tiny_sd, store)
        for name in "abba":
            adapters.use({name: 1.0})
            assert all(p.device == npu for path, p in tiny_sd.unet.named_parameters() if f".{name}." in path)
            assert torch.equal(draw(tiny_sd), pictures[name])
        assert column(store, "hits")[2]


def draw(pipe: StableDiffusionPipeline) -> torch.Tensor:
    options = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "latent"}
    return pipe("a cat", generator=torch.manual_seed(0), **options).images
