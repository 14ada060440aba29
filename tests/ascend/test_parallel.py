"""Which rank computes what, and how shares come together again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ascend import parallel
from ascend.parallel import LocalRows, Mesh, ParallelError, SharedBatch, choose_branch_size, rows_of


@pytest.mark.parametrize(
    ("ranks", "guidance", "wanted", "expected"),
    [
        (1, True, None, 1),
        (2, True, None, 2),
        (8, True, None, 2),
        (8, False, None, 1),
        (3, False, None, 1),
        (3, True, 1, 1),
    ],
)
def test_branches_are_shared_by_pairs(ranks: int, guidance: bool, wanted: int | None, expected: int) -> None:
    assert choose_branch_size(ranks, guidance, wanted) == expected


def test_an_odd_number_of_devices_is_refused() -> None:
    with pytest.raises(ParallelError, match="3 devices cannot share the two branches"):
        choose_branch_size(3, has_guidance=True)
    with pytest.raises(ParallelError, match="--guidance_scale turns it off"):
        choose_branch_size(2, has_guidance=False, wanted=2)


@pytest.mark.parametrize("rows", range(1, 12))
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_rows_are_dealt_out_evenly_and_in_order(rows: int, ranks: int) -> None:
    shares = [range(*rows_of(rows, rank, ranks)) for rank in range(ranks)]
    assert [row for share in shares for row in share] == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_groups_draw_all_prompts_once() -> None:
    meshes = [Mesh(rank, 6, 2) for rank in range(6)]
    assert [(mesh.data, mesh.branch) for mesh in meshes] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert sorted(prompt for mesh in meshes[::2] for prompt in mesh.share(7)) == list(range(7))


def gathers(shares: list[torch.Tensor]) -> Any:
    """all_gather of a rank whose peers give `shares`."""

    def gather(everyone: torch.Tensor, mine: torch.Tensor, group: Any) -> None:
        assert all(len(share) == len(mine) for share in shares)
        everyone.copy_(torch.cat(shares))

    return gather


@pytest.mark.parametrize("rank", [0, 1])
def test_three_rows_on_two_ranks(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = torch.arange(12.0).view(3, 4)
    shares = [batch[:2] * 2, torch.cat([batch[2:] * 2, torch.zeros(1, 4)])]
    monkeypatch.setattr(parallel, "all_gather", gathers(shares))
    seen = {}

    def forward(rows: torch.Tensor, scalar: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen.update(options, scalar=scalar)
        return rows * 2, rows + 100

    split = SharedBatch(forward, Mesh(rank, 2, 2, group=object()), must_split=True)
    prompt = {"block": (torch.arange(3.0), torch.arange(3.0) + 10)}
    result, feature = split(batch, torch.tensor(5), prompt=prompt, one=torch.zeros(1, 4), cached_feature=None)
    mine = slice(0, 2) if rank == 0 else slice(2, 3)
    assert torch.equal(result, batch * 2)
    assert torch.equal(seen["prompt"]["block"][1], prompt["block"][1][mine])
    assert seen["one"].shape == (1, 4) and seen["scalar"].item() == 5
    assert len(feature) == 3 and torch.equal(feature.tensor, batch[mine] + 100)
    split(batch, torch.tensor(5), cached_feature=feature)
    assert torch.equal(seen["cached_feature"], batch[mine] + 100)  # its own rows, as it returned them


def test_a_prompt_is_cut_once_for_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "all_gather", gathers([torch.zeros(1), torch.zeros(1)]))
    seen: list[torch.Tensor] = []

    def forward(rows: torch.Tensor, encoder_hidden_states: dict[str, tuple[torch.Tensor]]) -> torch.Tensor:
        seen.append(encoder_hidden_states["block"][0])
        return rows

    split = SharedBatch(forward, Mesh(1, 2, 2, group=object()), must_split=True)
    first, second = ({"block": (torch.tensor([0.0, value]),)} for value in (1.0, 2.0))
    for prompt in (first, first, second):
        split(torch.zeros(2), encoder_hidden_states=prompt)
    assert [tensor.tolist() for tensor in seen] == [[1.0], [1.0], [2.0]]
    assert seen[0] is seen[1]


def test_a_batch_without_branches_is_refused_or_computed_by_all() -> None:
    mesh = Mesh(0, 2, 2, group=object())
    with pytest.raises(ParallelError, match="2 devices cannot share a batch of 1"):
        SharedBatch(lambda x: x, mesh, must_split=True)(torch.zeros(1))
    assert SharedBatch(lambda x: x + 1, mesh, must_split=False)(torch.zeros(1)).item() == 1


def test_a_feature_is_as_long_as_the_batch() -> None:
    assert len(LocalRows(torch.zeros(2, 3), 4)) == 4
