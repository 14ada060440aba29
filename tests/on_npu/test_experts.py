"""The operators of mixtures of experts against plain arithmetic, in calls and in graphs, and what the chips refuse."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch_npu

from tests.on_npu.helpers import FLOATS, SATURATES, assert_close, reference
from tests.on_npu.inputs import numbers

TOKENS, DIM, HIDDEN, EXPERTS, CHOICES = 21, 32, 48, 4, 2
FRACTAL_NZ = 29
HALVES = tuple(dtype for dtype in FLOATS if dtype != torch.float32)
ON_910B = pytest.mark.skipif(SATURATES, reason="310P has no kernel for it")


@pytest.fixture(autouse=True)
def private_formats() -> Iterator[None]:
    torch._dynamo.reset()
    torch.npu.config.allow_internal_format = True
    yield
    torch.npu.config.allow_internal_format = False


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    import torchair

    return torch.compile(function, backend=torchair.get_npu_backend(), fullgraph=True, dynamic=False)


def choices() -> torch.Tensor:
    """`[tokens, choices]` int32; no token takes the last expert but one."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.tensor([0, 1, 3])
    return torch.stack([kept[torch.randperm(3, generator=generator)[:CHOICES]] for _ in range(TOKENS)]).int()


def sorted_rows(experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The choice of each row, the row of each choice, and where the experts' rows end."""
    order = torch.argsort(experts.flatten(), stable=True)
    return order, torch.argsort(order), torch.bincount(experts.flatten(), minlength=EXPERTS).cumsum(0)


def grouped(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    starts = [0, *ends.tolist()]
    parts = [x[a:b] @ weight[n] for n, (a, b) in enumerate(zip(starts, starts[1:], strict=False))]
    return torch.cat(parts)


def npu_grouped(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, **options: Any) -> torch.Tensor:
    options = {"split_item": 3, "group_type": 0} | options
    (result,) = torch_npu.npu_grouped_matmul([x], [weight], group_list=ends, **options)
    return result


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("form", ("dense", "transposed", "FRACTAL_NZ", "counts"))
def test_products_of_groups_of_rows(form: str, dtype: torch.dtype) -> None:
    x, weight = numbers((TOKENS * CHOICES, DIM), dtype), numbers((EXPERTS, DIM, HIDDEN), dtype, seed=1)
    ends = sorted_rows(choices())[2]
    expected = grouped(reference(x), reference(weight), ends)
    there, list_type = weight.to("npu"), 0
    if form == "transposed":
        there = weight.transpose(1, 2).contiguous().to("npu").transpose(1, 2)
    elif form == "FRACTAL_NZ":
        there = torch_npu.npu_format_cast(there, FRACTAL_NZ)
    elif form == "counts":
        ends, list_type = ends.diff(prepend=torch.zeros(1, dtype=torch.long)), 1
    assert_close(npu_grouped(x.to("npu"), there, ends.to("npu"), group_list_type=list_type), expected, factor=4)
    in_graph = compiled(lambda x, weight, ends: npu_grouped(x, weight, ends, group_list_type=list_type))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchair's, of what it reads in torch
        assert_close(in_graph(x.to("npu"), there, ends.to("npu")), expected, factor=4)


@ON_910B
def test_products_one_by_one_with_bias_and_of_columns() -> None:
    xs = [numbers((n, DIM), torch.float16, seed=n) for n in (3, 5)]
    weights = [numbers((DIM, n), torch.float16, seed=n) for n in (16, 24)]
    biases = [numbers((n,), torch.float16, seed=n) for n in (16, 24)]
    results = torch_npu.npu_grouped_matmul(
        [x.npu() for x in xs], [w.npu() for w in weights], bias=[b.npu() for b in biases], split_item=0, group_type=-1
    )
    for result, x, weight, bias in zip(results, xs, weights, biases, strict=True):
        assert_close(result, x.float() @ weight.float() + bias.float(), factor=4)
    x, weight = numbers((DIM, 12), torch.float16), numbers((12, HIDDEN), torch.float16, seed=1)
    ends = torch.tensor([5, 12])
    expected = torch.stack([x[:, :5].float() @ weight[:5].float(), x[:, 5:].float() @ weight[5:].float()])
    (result,) = torch_npu.npu_grouped_matmul(
        [x.npu()], [weight.npu()], group_list=ends.npu(), split_item=3, group_type=2
    )
    assert_close(result, expected, factor=4)


@ON_910B
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gating(dtype: torch.dtype) -> None:
    logits = numbers((TOKENS, EXPERTS), dtype)
    shares, experts = reference(logits).softmax(-1).sort(dim=-1, descending=True, stable=True)
    finished = torch.arange(TOKENS) % 3 == 0
    for mask in (None, finished):
        y, indices, rows = torch_npu.npu_moe_gating_top_k_softmax(
            logits.npu(), mask if mask is None else mask.npu(), k=2
        )
        expected = experts[:, :2] if mask is None else experts[:, :2].masked_fill(mask[:, None], EXPERTS)
        assert_close(y, shares[:, :2])
        assert torch.equal(indices.cpu(), expected.int())
        assert torch.equal(rows.cpu(), torch.arange(2 * TOKENS).view(2, TOKENS).t().int())
    y, indices, whole = torch_npu.npu_moe_gating_top_k_softmax_v2(logits.npu(), k=2, renorm=1)
    assert_close(y, shares[:, :2] / shares[:, :2].sum(-1, keepdim=True), factor=2)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_routing_there_and_back(dtype: torch.dtype) -> None:
    x, experts = numbers((TOKENS, DIM), dtype), choices()
    order, places, ends = sorted_rows(experts)
    rows, there, tokens, _ = torch_npu.npu_moe_init_routing_v2(
        x.npu(), experts.npu(), active_num=experts.numel(), expert_num=EXPERTS, expert_tokens_num_type=0,
        expert_tokens_num_flag=True, active_expert_range=[0, EXPERTS],
    )  # fmt: skip
    assert torch.equal(rows.cpu(), x[order // CHOICES])
    assert torch.equal(there.cpu(), places.int())
    assert tokens.dtype == (torch.int32 if SATURATES else torch.int64) and torch.equal(tokens.cpu().long(), ends)
    shares = numbers((TOKENS, CHOICES), dtype, seed=1, low=0, high=1)
    expected = (reference(x)[:, None] * reference(shares)[..., None]).sum(1)
    assert_close(torch_npu.npu_moe_token_unpermute(rows, there, probs=shares.npu()), expected, factor=2)
    if not SATURATES:
        skip = numbers((TOKENS, DIM), dtype, seed=2)
        by_rows = torch_npu.npu_moe_finalize_routing(
            rows, skip.npu(), None, None, shares.npu(), there, None, drop_pad_mode=2
        )
        assert_close(by_rows, reference(skip) + expected, factor=2)
        columns = places.view(TOKENS, CHOICES).t().flatten().int()
        bias = numbers((EXPERTS, DIM), dtype, seed=3)
        with_bias = ((reference(x)[:, None] + reference(bias)[experts.long()]) * reference(shares)[..., None]).sum(1)
        by_columns = torch_npu.npu_moe_finalize_routing(
            rows, skip.npu(), None, bias.npu(), shares.npu(), columns.npu(), experts.npu()
        )
        assert_close(by_columns, reference(skip) + with_bias, factor=2)


@ON_910B
def test_counts_a_part_of_the_experts_and_the_first_edition() -> None:
    x, experts = numbers((TOKENS, DIM), torch.float16), choices()
    order, places, ends = sorted_rows(experts)
    rows, there, counts, _ = torch_npu.npu_moe_init_routing_v2(
        x.npu(), experts.npu(), active_num=-1, expert_num=EXPERTS, expert_tokens_num_type=1,
        expert_tokens_num_flag=True, active_expert_range=[1, EXPERTS], row_idx_type=0,
    )  # fmt: skip
    kept = experts.flatten()[order] >= 1
    assert torch.equal(counts.cpu(), ends.diff())
    assert torch.equal(rows.cpu()[: kept.sum()], x[order[kept] // CHOICES])
    assert torch.equal(there.cpu() < 0, experts.flatten() < 1)
    numbered = torch.arange(TOKENS * CHOICES).view(CHOICES, TOKENS).t().int()
    rows, there, by_expert = torch_npu.npu_moe_init_routing(x.npu(), numbered.npu(), experts.npu(), TOKENS)
    assert torch.equal(rows.cpu(), x[order // CHOICES])
    assert torch.equal(by_expert.cpu(), experts.flatten().sort()[0])
    assert torch.equal(there.cpu(), places.view(TOKENS, CHOICES).t().flatten().int())
    permuted, sorted_indices = torch_npu.npu_moe_token_permute(x.npu(), experts.npu().long())
    assert torch.equal(permuted.cpu(), x[order // CHOICES]) and torch.equal(sorted_indices.cpu(), places.int())


def refusals() -> dict[str, tuple[Callable[[], object], str]]:
    x, weight = torch.zeros(4, 32).half().npu(), torch.zeros(2, 32, 24).half().npu()
    ends = torch.tensor([1, 4]).npu()
    wide = torch.zeros(2, 32, 20).half().npu()
    logits, experts = torch.zeros(4, 4).half().npu(), torch.zeros(4, 2, dtype=torch.int32).npu()
    gating = lambda: torch_npu.npu_moe_gating_top_k_softmax(logits, None, k=2)  # noqa: E731
    if not SATURATES:
        nz = torch_npu.npu_format_cast(weight, FRACTAL_NZ)
        return {
            "FRACTAL_NZ of 24 columns": (lambda: npu_grouped(x, nz, ends), "multiples of 16"),
            "a part of the rows": (
                lambda: torch_npu.npu_moe_init_routing_v2(x, experts, active_num=3, expert_num=4),
                "number of all rows",
            ),
        }
    return {
        "float32": (lambda: npu_grouped(x.float(), weight.float(), ends), "must be float16"),
        "20 columns": (lambda: npu_grouped(x, wide, ends), "align with 32 Bytes"),
        "columns": (lambda: npu_grouped(x, x, ends, group_type=2), "group_type must be 0"),
        "an activation": (lambda: npu_grouped(x, weight, ends, act_type=5), "there is no activation"),
        "several": (
            lambda: torch_npu.npu_grouped_matmul([x, x], [x.t(), x.t()], split_item=0, group_type=-1),
            "only one x",
        ),
        "gating": (gating, "no kernel"),
        "routing of -1 rows": (
            lambda: torch_npu.npu_moe_init_routing_v2(x, experts, expert_num=4),
            "must not be negative",
        ),
        "finalize": (
            lambda: torch_npu.npu_moe_finalize_routing(x, None, None, None, None, experts[:, 0].contiguous(), None),
            "no kernel",
        ),
    }


def test_what_a_chip_refuses() -> None:
    for name, (call, message) in refusals().items():
        with pytest.raises(RuntimeError) as refusal:
            call()
        assert message in str(refusal.value), name


def test_groups_that_do_not_cover_the_rows_are_an_error() -> None:
    x, weight = torch.zeros(4, 32).half().npu(), torch.zeros(2, 32, 32).half().npu()
    for ends in ([1, 3], [3, 1]):
        with pytest.raises(RuntimeError, match="group_list"):
            npu_grouped(x, weight, torch.tensor(ends).npu())
            torch.npu.synchronize()


@ON_910B
def test_a_mixture_in_one_graph() -> None:
    x, weight = numbers((TOKENS, DIM), torch.float16), numbers((EXPERTS, DIM, DIM), torch.float16, seed=1)
    logits, skip = numbers((TOKENS, EXPERTS), torch.float16, seed=2), numbers((TOKENS, DIM), torch.float16, seed=3)

    def mixture(x: torch.Tensor, weight: torch.Tensor, logits: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        shares, experts, _ = torch_npu.npu_moe_gating_top_k_softmax(logits, None, k=CHOICES)
        rows, places, ends, _ = torch_npu.npu_moe_init_routing_v2(
            x, experts, active_num=experts.numel(), expert_num=EXPERTS, expert_tokens_num_type=0,
            expert_tokens_num_flag=True, active_expert_range=[0, EXPERTS],
        )  # fmt: skip
        results = npu_grouped(rows, weight, ends)
        return torch_npu.npu_moe_finalize_routing(results, skip, None, None, shares, places, None, drop_pad_mode=2)

    tensors = [tensor.npu() for tensor in (x, weight, logits, skip)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = compiled(mixture)(*tensors)
    assert_close(result, mixture(*tensors).cpu().float(), factor=2)
    shares, experts = logits.float().softmax(-1).topk(CHOICES)
    chosen = torch.einsum("td,tcde->tce", x.float(), weight.float()[experts])
    assert_close(result, skip.float() + (chosen * shares[..., None]).sum(1), factor=8)
