"""Which rank computes what, and how shares come together again."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from ascend.parallel import Mesh, ParallelError, choose_branch_size, share_guidance, shared_batch, unshare_guidance
from ascend.parallel.agreement import MOST_DIMENSIONS, PARTS, PICKED, differences, fingerprint
from ascend.parallel.shared_batch import LocalRows, SharedBatch, rows_of
from tests.programs import ROOT, environment


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


class UNet2DConditionModel(nn.Module):
    """Stands for the true one, whose arguments are known by its name; `seen` is what its forward was given."""

    def forward(
        self,
        sample: torch.Tensor,
        timestep: Any,
        encoder_hidden_states: Any,
        timestep_cond: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        projected_prompt: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
        cached_feature: torch.Tensor | None = None,
        other: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen = {name: value for name, value in locals().items() if name != "self"}
        return sample * 2, sample + 100


def unet_of_rank(rank: int, shares: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> UNet2DConditionModel:
    """A UNet shared by two ranks, the second of which is not there; the ranks agree, and give `shares`."""

    def gather(everyone: torch.Tensor, mine: torch.Tensor, group: Any) -> None:
        if len(mine) == len(PARTS) * (MOST_DIMENSIONS + PICKED):
            everyone.copy_(torch.cat([mine, mine]))
        else:
            everyone.copy_(torch.cat(shares))

    monkeypatch.setattr(shared_batch, "all_gather", gather)
    unet = UNet2DConditionModel()
    unet.forward = SharedBatch(unet, Mesh(rank, 2, 2, group=object()), must_split=True)
    return unet


@pytest.mark.parametrize("rank", [0, 1])
def test_three_rows_on_two_ranks(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = torch.arange(12.0).view(3, 4)
    unet = unet_of_rank(rank, [batch[:2] * 2, torch.cat([batch[2:] * 2, torch.zeros(1, 4)])], monkeypatch)
    prompt = torch.arange(3.0)
    projected = {"block": (torch.arange(3.0), torch.arange(3.0) + 10)}
    result, feature = unet(batch, torch.tensor(5), prompt, torch.zeros(1, 4), projected_prompt=projected)
    mine = slice(0, 2) if rank == 0 else slice(2, 3)
    assert torch.equal(result, batch * 2)
    assert torch.equal(unet.seen["encoder_hidden_states"], prompt[mine])
    assert torch.equal(unet.seen["projected_prompt"]["block"][1], projected["block"][1][mine])
    assert unet.seen["timestep_cond"].shape == (1, 4) and unet.seen["timestep"].item() == 5  # for all samples
    assert len(feature) == 3 and torch.equal(feature.tensor, batch[mine] + 100)
    unet(batch, torch.tensor(5), prompt, cached_feature=feature)
    assert torch.equal(unet.seen["cached_feature"], batch[mine] + 100)  # its own rows, as it returned them


def test_arguments_are_told_apart_by_name_and_not_by_their_length(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = unet_of_rank(1, [torch.zeros(1), torch.zeros(1)], monkeypatch)
    masks = torch.zeros(2, 1, 8, 8)  # of two adapters, for all samples
    call = {"sample": torch.zeros(2), "timestep": 5, "encoder_hidden_states": torch.zeros(2, 4)}
    unet(**call, cross_attention_kwargs={"scale": 0.5, "ip_adapter_masks": masks})
    assert len(unet.seen["sample"]) == len(unet.seen["encoder_hidden_states"]) == 1
    assert unet.seen["cross_attention_kwargs"]["ip_adapter_masks"] is masks
    with pytest.raises(ParallelError, match="other holds a tensor, and it is not known"):
        unet(**call, other=torch.zeros(2, 3))
    with pytest.raises(ParallelError, match="timestep_cond holds a tensor of 3 rows for a batch of 2"):
        unet(**call, timestep_cond=torch.zeros(3, 3))


def test_a_prompt_is_cut_once_for_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = unet_of_rank(1, [torch.zeros(1), torch.zeros(1)], monkeypatch)
    first, second = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0])
    seen = []
    for prompt in (first, first, second):
        unet(torch.zeros(2), 5, prompt)
        seen.append(unet.seen["encoder_hidden_states"])
    assert [tensor.tolist() for tensor in seen] == [[1.0], [1.0], [2.0]]
    assert seen[0] is seen[1]


@pytest.mark.parametrize("name", ["encoder_hidden_states", "projected_prompt"])
def test_a_picture_begins_with_another_prompt_in_either_form(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    unet = unet_of_rank(1, [torch.zeros(1), torch.zeros(1)], monkeypatch)
    compared: list[int] = []
    monkeypatch.setattr(shared_batch, "differences", lambda *_: compared.append(1))
    first, second = ({"block": (torch.zeros(2), torch.zeros(2))} for _ in range(2))
    for prompt in (first, first, second, second, first):
        call = {"encoder_hidden_states": None} | {name: prompt}
        unet(torch.zeros(2), 5, **call)
    assert len(compared) == 3
    unet(torch.zeros(2), 5, torch.zeros(2, 4))  # in the other form: another picture
    assert len(compared) == 4 and unet.seen["projected_prompt"] is None


def test_a_batch_without_branches_is_refused_or_computed_by_all(
    tiny_sd: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = unet_of_rank(0, [], monkeypatch)
    with pytest.raises(ParallelError, match="2 devices cannot share a batch of 1"):
        unet(torch.zeros(1), 5, torch.zeros(1))
    decoder = tiny_sd.vae.decoder
    latents = torch.randn(1, 4, 4, 4)
    expected = decoder(latents)
    decoder.forward = SharedBatch(decoder, Mesh(0, 2, 2, group=object()), must_split=False)
    assert torch.equal(decoder(latents), expected)


def test_sharing_twice_is_sharing_once_and_unsharing_puts_everything_back(tiny_sd: StableDiffusionPipeline) -> None:
    modules, mesh = (tiny_sd.unet, tiny_sd.vae.decoder), Mesh(0, 2, 2, group=object())
    tiny_sd.vae.decoder.forward = replaced = functools.partial(type(tiny_sd.vae.decoder).forward, tiny_sd.vae.decoder)
    before = [set(vars(module)) for module in modules]
    share_guidance(tiny_sd, mesh)
    once = [module.forward for module in modules]
    share_guidance(tiny_sd, mesh)
    assert [module.forward for module in modules] == once
    with pytest.raises(ParallelError, match="unet is shared by other ranks already: call unshare_guidance first"):
        share_guidance(tiny_sd, Mesh(0, 2, 2, group=object()))
    for _ in range(2):
        unshare_guidance(tiny_sd)
        assert [set(vars(module)) for module in modules] == before
        assert tiny_sd.vae.decoder.forward is replaced


def test_a_forward_that_was_replaced_since_is_not_shared_again_nor_lost(tiny_sd: StableDiffusionPipeline) -> None:
    mesh = Mesh(0, 2, 2, group=object())
    share_guidance(tiny_sd, mesh)
    tiny_sd.unet.forward = hook = functools.partial(tiny_sd.unet.forward)
    for call in (lambda: share_guidance(tiny_sd, mesh), lambda: unshare_guidance(tiny_sd)):
        with pytest.raises(ParallelError, match="unet.forward was replaced after share_guidance"):
            call()
    assert tiny_sd.unet.forward is hook and isinstance(tiny_sd.vae.decoder.forward, SharedBatch)


def test_a_module_whose_arguments_are_not_known_is_refused(tiny_sd: StableDiffusionPipeline) -> None:
    tiny_sd.unet = torch.nn.Linear(1, 1)
    with pytest.raises(ParallelError, match="the unet is a Linear, and it is not known how to share its batch"):
        share_guidance(tiny_sd, Mesh(0, 2, 2, group=object()))


@pytest.fixture(scope="module")
def guidance(tiny_sd_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two true ranks drew, and how they refused to draw, see guidance_ranks.py."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("guidance_ranks.py")
    command = [sys.executable, ROOT / "examples/launch.py", "--device_list", "0,1", "--", script, tiny_sd_dir]
    arguments = [str(part) for part in [*command, folder]]
    subprocess.run(arguments, check=True, capture_output=True, text=True, env=environment())
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_two_ranks_draw_the_pictures_of_one(guidance: list[dict[str, Any]]) -> None:
    for rank in guidance:
        assert rank["difference of two pictures"] < 1e-4  # of latents up to 10, in float32, summed in other batches
        assert rank["difference with keyword arguments and an output class"] < 1e-5


@pytest.mark.parametrize("what", ["latents", "prompts", "timesteps"])
def test_ranks_that_were_given_different_things_are_told(guidance: list[dict[str, Any]], what: str) -> None:
    for rank in guidance:
        assert rank[what].startswith(f"ranks 0 and 1 cannot share a picture, as their {what} differ"), rank[what]


def test_ranks_compare_once_a_picture(guidance: list[dict[str, Any]]) -> None:
    assert [rank["comparisons of two pictures"] for rank in guidance] == [2, 2]


def test_forecasts_are_those_of_one_device_and_compare_each_kind_of_step_once(guidance: list[dict[str, Any]]) -> None:
    for rank in guidance:
        assert rank["difference with forecasts"] < 1e-4
        assert rank["comparisons with forecasts"] == 2 * 2  # two pictures, full and shallow steps


def test_a_fingerprint_tells_other_noise_and_prompts_and_not_the_last_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, prompt = torch.randn(2, 4, 64, 64, generator=generator), torch.randn(2, 77, 1024, generator=generator)
    mine = fingerprint(latents, 981, prompt)
    assert not differences(mine, fingerprint(latents * (1 + 2**-8), torch.tensor(981), prompt.bfloat16()))
    assert differences(mine, fingerprint(latents[:1], 981, prompt)) == ["latents"]
    assert differences(mine, fingerprint(latents.flip(3), 961, prompt)) == ["latents", "timesteps"]
    other = torch.cat([prompt[:1], prompt[1:].roll(1, 1)])  # the second prompt alone
    assert differences(mine, fingerprint(latents, 981, other)) == ["prompts"]
    nothing = torch.full_like(latents, torch.nan)
    assert not differences(fingerprint(nothing, 981, prompt), fingerprint(nothing, 981, prompt))


def test_a_feature_is_as_long_as_the_batch() -> None:
    rows = LocalRows(torch.zeros(2, 3), 4, lambda mine, _: torch.cat([mine, mine + 1]))
    assert len(rows) == 4
    assert torch.equal(rows.chunk(2)[1], torch.ones(2, 3))
