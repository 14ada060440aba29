"""What has equal rows is computed for one of them: read from graphs alone, so that any device will do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from ascend.graphs.fusions import fuse
from ascend.graphs.rows import compute_equal_rows_once

MAPS, WEIGHT, SHIFTS = torch.randn(3, 4, 5, 5), torch.randn(6, 4, 3, 3), torch.randn(16, 12)


def rewritten(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> fx.GraphModule:
    """The graph of `function`, which computes for `inputs` what that does."""
    module = make_fx(function, tracing_mode="fake")(*inputs)
    compute_equal_rows_once(module.graph)
    fuse(module.graph)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    torch.testing.assert_close(module(*inputs), function(*inputs))
    return module


def targets(module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


def shifted(step: torch.Tensor, x: torch.Tensor, projection: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As a residual block adds a timestep, which is repeated for each picture if it is one."""
    angles = step.reshape(-1).expand(3)[:, None].float() * torch.arange(8)
    embedding = F.silu(torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1))
    return F.conv2d(x, weight, padding=1) + torch.mm(embedding, projection).split(6, dim=1)[1][:, :, None, None]


def test_what_follows_from_one_timestep_is_computed_once_and_is_the_bias_of_the_convolution() -> None:
    module = rewritten(shifted, torch.tensor(7), MAPS, SHIFTS, WEIGHT)
    [product] = module.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    assert product.meta["val"].shape == (1, 12)
    assert not {"aten.add.Tensor", "aten.expand.default"} & set(targets(module))


def test_timesteps_of_their_own_stay_rows_of_their_own() -> None:
    module = rewritten(shifted, torch.tensor([7, 500, 90]), MAPS, SHIFTS, WEIGHT)
    [product] = module.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    assert product.meta["val"].shape == (3, 12)
    assert "aten.add.Tensor" in targets(module)


# Each needs all rows somewhere, or mixes them.
NEEDS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "a sum over rows": lambda row, x: row.expand(3, -1).exp().sum(0) + x[0],
    "a product on the right": lambda row, x: x[:, :3] @ row.expand(3, -1).exp(),
    "a concatenation of rows": lambda row, x: torch.cat([row.expand(3, -1).exp(), x]),
    "other rows beside it": lambda row, x: torch.cat([row.expand(3, -1).exp(), x], dim=-1),
    "a slice of rows": lambda row, x: row.expand(3, -1).exp()[1:] * x[1:],
    "a smaller rank": lambda row, x: row[0, :1].expand(4).exp() * x,
    "the result": lambda row, x: row.expand(3, -1).exp(),
    "itself": lambda row, x: row.expand(3, -1).exp().matmul(row.expand(3, -1).cos().t()),
}


@pytest.mark.parametrize("name", NEEDS)
def test_all_rows_are_there_where_they_are_needed(name: str) -> None:
    rewritten(NEEDS[name], torch.randn(1, 4), torch.randn(3, 4))


def test_random_rows_differ() -> None:
    def noisy(row: torch.Tensor) -> torch.Tensor:
        return torch.bernoulli(row.expand(64, -1).sigmoid())

    module = make_fx(noisy, tracing_mode="fake")(torch.zeros(1, 4))
    compute_equal_rows_once(module.graph)
    module.recompile()
    assert module(torch.zeros(1, 4)).std(0).min() > 0


def residual(x: torch.Tensor, plain: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The sum of a convolution's map with a plain one, which has been transposed."""
    return F.conv2d(x, weight, padding=1) + plain.transpose(1, 2).reshape(3, 6, 5, 5)


def test_a_plain_map_is_added_in_three_dimensions() -> None:
    module = rewritten(residual, MAPS, torch.randn(3, 25, 6), WEIGHT)
    [addition] = module.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    assert addition.meta["val"].shape == (3, 6, 25)


def test_the_sum_of_two_convolutions_stays_as_it_is() -> None:
    module = rewritten(lambda x, weight: F.conv2d(x, weight) + F.conv2d(x * 2, weight), MAPS, WEIGHT)
    [addition] = module.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    assert addition.meta["val"].shape == (3, 6, 3, 3)
