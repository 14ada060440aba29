"""Operators that move, search and reduce, against the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tests.on_npu.helpers import FLOATS, INTEGERS, LAYOUTS, assert_close, on_npu, reference
from tests.on_npu.inputs import numbers

Function = Callable[[torch.Tensor], torch.Tensor]

MOVES: dict[str, Function] = {
    "slice": lambda x: x[1:, ::2].clone(),
    "transpose": lambda x: x.transpose(0, 1).contiguous(),
    "permute": lambda x: x.permute(2, 0, 1).contiguous(),
    "flip": lambda x: x.flip(0, 2),
    "roll": lambda x: x.roll((1, 2), (0, 1)),
    "repeat": lambda x: x.repeat(2, 1, 3),
    "repeat interleave": lambda x: x.repeat_interleave(2, dim=1),
    "repeat interleave all": lambda x: x.repeat_interleave(3),
    "repeat interleave by counts": lambda x: x.repeat_interleave(_index(x, 2, 0, 1, 3), dim=1),
    "repeat interleave all by counts": lambda x: x.repeat_interleave(_index(x, *range(72))),
    "channel shuffle": lambda x: F.channel_shuffle(x.unsqueeze(-1), 2),
    "cat": lambda x: torch.cat([x, x + 1], dim=1),
    "stack": lambda x: torch.stack([x, x + 1], dim=-1),
    "split": lambda x: torch.cat(x.split(2, dim=1)[::-1], dim=1),
    "chunk": lambda x: torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1), value=7),
    "tril": lambda x: x.tril(1),
    "triu": lambda x: x.triu(-1),
    "index": lambda x: x[torch.tensor([2, 0, 1], device=x.device)],
    "index two": lambda x: x[torch.tensor([2, 0], device=x.device), torch.tensor([1, 3], device=x.device)],
    "index last": lambda x: x[:, :, torch.tensor([1, 1, 0], device=x.device)],
    "index mask": lambda x: x[x > 0],
    "index copy": lambda x: x.index_copy(1, _index(x, 3, 0), x[:, 1:3]),
    "index fill": lambda x: x.index_fill(1, _index(x, 3, 0), 5),
    "index fill tensor": lambda x: x.index_fill(1, _index(x, 3, 0), x[1, 2, 3]),
    "take": lambda x: x.take(_index(x, 71, 0, 13)),
    "index select": lambda x: x.index_select(1, torch.tensor([3, 0], device=x.device)),
    "gather": lambda x: x.gather(1, torch.tensor([[[3], [0]]], device=x.device).expand(3, 2, 6)),
    "masked fill": lambda x: x.masked_fill(x > 0, 5),
    "masked select": lambda x: x.masked_select(x > 0),
    "nonzero": lambda x: (x > 0).nonzero(),
    "put": lambda x: x.clone().index_put_((torch.tensor([0, 2], device=x.device),), x.new_tensor(4)),
    "put at places": lambda x: x.clone().put_(_index(x, 3, -1), x.new_tensor([4, 5])),
    "put at places accumulate": lambda x: x.clone().put_(_index(x, 0, 0, 7), x[0, 0, :3], accumulate=True),
    "put accumulate": lambda x: x.clone().index_put_((torch.tensor([0, 0], device=x.device),), x[:2], accumulate=True),
    "assign": lambda x: _assigned(x),
    "scatter": lambda x: x.scatter(1, torch.tensor([[[3], [0]]], device=x.device).expand(3, 2, 6), x[:, 2:] + 1),
    "scatter add": lambda x: x.scatter_add(1, torch.tensor([[[3], [3]]], device=x.device).expand(3, 2, 6), x[:, 2:]),
    "scatter value": lambda x: x.scatter(1, _index(x, 3, 0).view(2, 1).expand(3, 2, 6), 5),
    "index add": lambda x: x.index_add(1, torch.tensor([1, 1], device=x.device), x[:, :2]),
    "expand": lambda x: x[:, :1].expand(3, 4, 6).contiguous(),
    "unfold": lambda x: x.unfold(2, 3, 2).contiguous(),
    "fill": lambda x: x.clone().fill_(3),
    "zeros like": torch.zeros_like,
    "ones like": torch.ones_like,
}


def _index(x: torch.Tensor, *values: int) -> torch.Tensor:
    return torch.tensor(values, device=x.device)


def _assigned(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[1:, ::2, 3] = x[:2, 1::2, 0]
    return y


REDUCTIONS: dict[str, Function] = {
    "sum": lambda x: x.sum(),
    "sum dim": lambda x: x.sum(1),
    "sum dims": lambda x: x.sum((0, 2), keepdim=True),
    "mean": lambda x: x.mean(),
    "mean dim": lambda x: x.mean(-1, keepdim=True),
    "prod": lambda x: x.prod(1),
    "amax": lambda x: x.amax((0, 1)),
    "amin": lambda x: x.amin(-1),
    "max": lambda x: x.max(),
    "min": lambda x: x.min(),
    "max dim": lambda x: x.max(1)[0],
    "min dim": lambda x: x.min(1)[0],
    "smallest and largest": lambda x: torch.stack(torch.aminmax(x)),
    "smallest and largest dim": lambda x: torch.stack(torch.aminmax(x, dim=1)),
    "_aminmax": lambda x: torch.stack(torch._aminmax(x)),
    "_aminmax dim": lambda x: torch.stack(torch._aminmax(x, 1)),
    "prod of all": lambda x: x.prod(),
    "trace": lambda x: x[0].trace(),
    "nansum": lambda x: x.nansum(1),
    "var and mean": lambda x: torch.stack(torch.var_mean(x, dim=1, correction=0)),
    "std and mean": lambda x: torch.stack(torch.std_mean(x, dim=(0, 1), correction=2)),
    "var and mean of all": lambda x: torch.stack(torch.var_mean(x)),
    "sum of magnitudes": lambda x: torch.linalg.vector_norm(x, ord=1, dim=1),
    "norm without a dim": lambda x: torch.ops.aten.norm.Scalar(x, 2),
    "norm dim": lambda x: torch.ops.aten.norm.ScalarOpt_dim(x, 1, [1]),
    "topk smallest": lambda x: x.topk(3, dim=1, largest=False)[0],
    "std": lambda x: x.std(-1),
    "var": lambda x: x.var((0, 1), correction=0),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=-1),
    "distances": lambda x: torch.pdist(x[0].contiguous(), p=1),
    "cumsum": lambda x: x.cumsum(1),
    "cumprod": lambda x: x.cumprod(1),
    "softmax": lambda x: x.softmax(-1),
    "log softmax": lambda x: x.log_softmax(1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "sort": lambda x: x.sort(-1, descending=True)[0],
    "topk": lambda x: x.topk(3, dim=-1)[0],
}
INDICES: dict[str, Function] = {
    "argmax": lambda x: x.argmax(-1),
    "argmin": lambda x: x.argmin(1),
    "argsort": lambda x: x.argsort(stable=True, dim=-1),
    "sort": lambda x: x.sort(stable=True, dim=-1)[1],
    "topk": lambda x: x.topk(2, dim=-1)[1],
    "max dim": lambda x: x.max(1)[1],
    "min dim": lambda x: x.min(-1)[1],
    "bucketize": lambda x: torch.bucketize(x.round(), torch.tensor([-2.0, 0.0, 1.0], device=x.device)),
    "bucketize right": lambda x: torch.bucketize(x.round(), torch.arange(-2.0, 3.0, device=x.device), right=True),
    "searchsorted of a number": lambda x: torch.searchsorted(x[0, 0].sort()[0], 0.5),
    "any": lambda x: (x > 1).any(1),
    "all": lambda x: (x > -2).all(-1),
    "any of all": lambda x: (x > 1).any(),
    "searchsorted": lambda x: torch.searchsorted(x.sort(-1)[0], x),
}
FACTORIES: dict[str, Callable[[str], torch.Tensor]] = {
    "arange": lambda device: torch.arange(2, 20, 3, device=device),
    "arange float": lambda device: torch.arange(0, 1, 0.125, device=device),
    "linspace": lambda device: torch.linspace(-1, 1, 9, device=device),
    "logspace": lambda device: torch.logspace(-2, 3, 6, base=2, device=device),
    "range": lambda device: torch.range(2, 9, 1.5, device=device),
    "repeats": lambda device: torch.repeat_interleave(torch.tensor([2, 0, 3], device=device)),
    "one hot": lambda device: F.one_hot(torch.tensor([[2, 0], [1, 2]], device=device), 4),
    "full": lambda device: torch.full((2, 3), 1.5, device=device),
    "ones": lambda device: torch.ones(4, dtype=torch.int32, device=device),
    "zeros": lambda device: torch.zeros(2, 0, device=device),
    "eye": lambda device: torch.eye(3, 4, device=device),
    "tensor": lambda device: torch.tensor([[1, 2], [3, 4]], device=device),
    "scalar": lambda device: torch.tensor(2.5, device=device),
    "tril indices": lambda device: torch.ones(4, 4, dtype=torch.bool, device=device).tril(),
}


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("name", MOVES)
def test_moves(name: str, dtype: torch.dtype) -> None:
    x = numbers((3, 4, 6), dtype)
    for layout in LAYOUTS.values():
        assert_close(MOVES[name](on_npu(x, layout)), MOVES[name](x))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name: str, dtype: torch.dtype) -> None:
    x = numbers((3, 4, 6), dtype)
    for layout in LAYOUTS.values():
        assert_close(REDUCTIONS[name](on_npu(x, layout)), REDUCTIONS[name](reference(x)), factor=2)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_sums_of_integers(dtype: torch.dtype) -> None:
    x = numbers((5, 6), dtype)
    assert_close(x.to("npu").sum(), x.sum())
    assert_close(x.to("npu").sum(1), x.sum(1))
    assert_close(x.to("npu").cumsum(0), x.cumsum(0))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_counts(dtype: torch.dtype) -> None:
    x, weights = numbers((40,), dtype).abs(), numbers((40,), torch.float32)
    assert_close(x.to("npu").bincount(), x.bincount())
    assert_close(x.to("npu").bincount(minlength=20), x.bincount(minlength=20))
    assert_close(x.to("npu").bincount(weights.to("npu")), x.bincount(weights))


@pytest.mark.parametrize("name", INDICES)
def test_indices(name: str) -> None:
    x = numbers((3, 4, 6), torch.float32)
    for layout in LAYOUTS.values():
        assert_close(INDICES[name](on_npu(x, layout)), INDICES[name](x))


@pytest.mark.parametrize("name", FACTORIES)
def test_factories(name: str) -> None:
    assert_close(FACTORIES[name]("npu"), FACTORIES[name]("cpu"))


UNIQUES: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, ...]]] = {
    "values": lambda x: (torch.unique(x),),
    "unique": lambda x: torch.unique(x, return_inverse=True, return_counts=True),
    "_unique": lambda x: torch._unique(x, return_inverse=True),
    "consecutive": lambda x: torch.unique_consecutive(x, return_inverse=True, return_counts=True),
    "consecutive rows": lambda x: torch.unique_consecutive(
        x.view(-1, 1).expand(-1, 2), return_inverse=True, return_counts=True, dim=0
    ),
}


@pytest.mark.parametrize("name", UNIQUES)
def test_unique(name: str) -> None:
    x = torch.tensor([3, 1, 1, 3, 3, 2, 1])
    for actual, expected in zip(UNIQUES[name](x.to("npu")), UNIQUES[name](x), strict=True):
        assert_close(actual, expected)


def test_nansum_leaves_nan_out() -> None:
    x = torch.tensor([[1.0, float("nan"), 3.0], [4.0, 5.0, 6.0]])
    assert_close(torch.nansum(x.to("npu"), 0), torch.nansum(x, 0))


@pytest.mark.parametrize("reduce", ("sum", "prod", "amax", "amin", "mean"))
@pytest.mark.parametrize("include_self", (False, True))
def test_scatter_reduce(include_self: bool, reduce: str) -> None:
    x, y = numbers((4, 5), torch.float32), numbers((3, 5), torch.float32, seed=1)
    index = torch.tensor([[0], [2], [0]]).expand(3, 5)
    arguments = {"reduce": reduce, "include_self": include_self}
    expected = torch.scatter_reduce(x, 0, index, y, **arguments)
    for layout in LAYOUTS.values():
        there = [on_npu(x, layout), 0, index.to("npu"), on_npu(y, layout)]
        assert_close(torch.scatter_reduce(*there, **arguments), expected)
        out = torch.empty(4, 5, device="npu")  # what is asked for a result to write runs on the NPU in any case
        torch.scatter_reduce(*there, **arguments, out=out)
        assert_close(out, expected, factor=2)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_split_into_given_tensors(dtype: torch.dtype) -> None:
    sizes = [2000 + i for i in range(33)]  # what torch_npu hands to the operator at once: 33 to 64 parts of long rows
    x = numbers((3, sum(sizes)), dtype)
    for layout in LAYOUTS.values():
        out = [torch.empty(3, size, dtype=dtype, device="npu") for size in sizes]
        torch.split_with_sizes_copy(on_npu(x, layout), sizes, 1, out=out)
        for actual, expected in zip(out, x.split(sizes, 1), strict=True):
            assert_close(actual, expected)


def test_item_and_printing() -> None:
    x = torch.tensor([1.5, 2.5], device="npu")
    assert x.sum().item() == 4.0
    assert "2.5" in repr(x)
    assert torch.equal(x, x.clone())
