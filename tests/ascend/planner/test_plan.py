"""Which placement is chosen, what a plan says, and that pipelines run as planned."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from ascend.graphs.compile import compile_pipeline, is_compiled
from ascend.planner import MODES, MemoryPlan, PlanError, Request, apply_plan, memory_plan, plan_memory
from ascend.planner.__main__ import main
from ascend.planner.activations import peak_of, record_call
from ascend.planner.activity import FROM_DISK, LENT, RESIDENT, STREAMED, Part, Run, Weights
from ascend.planner.allocator import MIB, Event
from ascend.planner.plan import Speed, choose_plan
from ascend.streaming import find_blocks, lend_module, stop_streaming, stream_module
from ascend.streaming.blocks import bytes_of
from processors import quantize_weights
from tests.programs import ROOT, environment

CPU = torch.device("cpu")
UNIT = 20 * MIB
SPEED = Speed(link=1000.0 * UNIT, disk=100.0 * UNIT)


def sized(units: int) -> int:
    """Bytes of a tensor whose segment of the allocator is so large."""
    return units * UNIT - 512


def part(name: str, weights: int, block: int, around: int, phase: str, activations: int) -> Part:
    events = [Event(0, sized(activations)), Event(0, None)]
    number, rest = divmod(weights - around, block)
    sizes = {str(place): sized(size) for place, size in enumerate([block] * number + [rest] * bool(rest))}
    run = Run(phase, events, (), (sized(weights),), sizes)
    blocks = {name: {torch.float16: size} for name, size in sizes.items()}
    return Part(
        name, Weights((*sizes.values(), sized(around)), (*sizes.items(), (None, sized(around))), (), blocks), (run,)
    )


TEXT = part("text_encoder", 600, 30, 100, "encode", 10)
UNET = part("unet", 1600, 50, 20, "denoise", 200)
VAE = part("vae", 160, 40, 10, "decode", 400)
PARTS = [TEXT, UNET, VAE]


def chosen(limit: int, host: int = 10_000, mode: str = "auto") -> list[str]:
    plan = choose_plan(PARTS, limit * UNIT, host * UNIT, 50, lambda: SPEED, MODES[mode], mode == "auto")
    assert plan.peak <= plan.required <= limit * UNIT and plan.host <= host * UNIT
    return [placement.where for placement in plan.placements]


def draw(pipe: StableDiffusionPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", num_inference_steps=2, generator=generator, output_type="pt").images


def test_everything_stays_where_it_fits_and_as_little_as_needed_moves_where_not() -> None:
    assert chosen(2760) == [RESIDENT, RESIDENT, RESIDENT]  # 2360 of weights and the decoder's 400
    # The decoder's blocks are less, but their buffers would cut up the segment that the UNet's activations leave.
    assert chosen(2759) == [STREAMED, RESIDENT, RESIDENT]
    assert chosen(2700, mode="stream")[1] == STREAMED
    text, unet, vae = chosen(2400)
    assert unet == RESIDENT and {text, vae} != {RESIDENT}
    assert chosen(1000)[1] == STREAMED
    assert chosen(1000, host=500)[1] == FROM_DISK


def test_a_mode_says_where_the_denoiser_is() -> None:
    assert [chosen(10_000, mode=mode)[1] for mode in ("resident", "stream", "disk")] == [RESIDENT, STREAMED, FROM_DISK]


def test_a_plan_counts_what_is_there_at_the_same_time() -> None:
    plan = choose_plan(PARTS, 1000 * UNIT, 10_000 * UNIT, 50, lambda: SPEED, (STREAMED,), keeps_blocks=False)
    assert plan.buffers == 2 * sized(50)
    assert plan.seconds_per_step == pytest.approx(1580 / 1000)
    text = {RESIDENT: 600, LENT: 600, STREAMED: 100}[plan.where("text_encoder")]
    vae_at_rest = {RESIDENT: 160, LENT: 0, STREAMED: 10}[plan.where("vae")]
    assert plan.phases["encode"] == pytest.approx((100 + 20 + text + vae_at_rest + 10) * UNIT, rel=1e-4)
    assert plan.placements[1].why.startswith("as asked")
    table = plan.table()
    assert "unet" in table and "streamed" in table and "1.58 s a step" in table


def test_as_many_blocks_as_fit_stay_on_the_device_between_the_others() -> None:
    plan = choose_plan(PARTS, 2000 * UNIT, 10_000 * UNIT, 50, lambda: SPEED)
    assert plan.where("unet") == STREAMED and plan.limit == 2000 * UNIT
    kept = [int(name) for name in plan.kept("unet")]
    assert 0 < len(kept) < 32
    gaps = {after - before for before, after in pairwise(kept)}
    assert max(gaps) - min(gaps) <= 1, "evenly"
    assert 0.9 * plan.limit < plan.required <= 0.95 * plan.limit
    units = sum(30 if place == 31 else 50 for place in kept)
    assert plan.placements[1].on_device == pytest.approx((20 + units) * UNIT, rel=1e-4)
    assert plan.seconds_per_step == pytest.approx((1580 - units) / 1000)
    assert f"and {len(kept)} stay there" in plan.table()
    assert not choose_plan(
        PARTS, 2000 * UNIT, 10_000 * UNIT, 50, lambda: SPEED, MODES["stream"], keeps_blocks=False
    ).kept("unet")


def test_a_pipeline_of_which_some_blocks_stay_draws_the_same(tiny_sd: StableDiffusionPipeline) -> None:
    expected = draw(tiny_sd)
    plan = plan_memory(tiny_sd, CPU, Request(64, 64), torch.float32, mode="stream", limit=2**30)
    placements = tuple(replace(p, kept=("down_blocks.1",) if p.name == "unet" else ()) for p in plan.placements)
    apply_plan(tiny_sd, replace(plan, placements=placements), CPU)
    assert len(tiny_sd.unet._hf_hook.kept) == 1 and torch.equal(draw(tiny_sd), expected)


def test_what_is_not_known_of_a_denoiser_keeps_the_memory_free() -> None:
    unknown = [TEXT, replace(UNET, unknown="how it is called is not known"), VAE]
    plan = choose_plan(unknown, 2000 * UNIT, 10_000 * UNIT, 50, lambda: SPEED)
    assert plan.where("unet") == STREAMED and not plan.kept("unet")


def test_a_plan_serves_a_pipeline_whose_blocks_are_cut_otherwise_since(
    tiny_sd: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an adapter lifts one over what a buffer should hold."""
    expected = draw(tiny_sd)
    plan = plan_memory(tiny_sd, CPU, Request(64, 64), torch.float32, mode="stream", limit=2**30)
    placements = tuple(replace(p, kept=("down_blocks.1",) if p.name == "unet" else ()) for p in plan.placements)
    monkeypatch.setattr(memory_plan, "LARGEST_BLOCK", 1)
    apply_plan(tiny_sd, replace(plan, placements=placements), CPU)
    kept = {id(block.module) for block in tiny_sd.unet._hf_hook.kept}
    assert kept == {id(part) for part in find_blocks(tiny_sd.unet.down_blocks[1], 1).values()}
    assert torch.equal(draw(tiny_sd), expected)


def test_speed_is_measured_where_a_choice_depends_on_it() -> None:
    asked = []

    def measure() -> Speed:
        asked.append(True)
        return SPEED

    for mode in ("auto", "resident"):
        assert choose_plan(PARTS, 3000 * UNIT, 10_000 * UNIT, 50, measure, MODES[mode]).is_resident
    assert not asked
    choose_plan(PARTS, 1000 * UNIT, 10_000 * UNIT, 50, measure)
    assert asked


def test_what_cannot_be_says_what_is_missing() -> None:
    with pytest.raises(PlanError, match="no placement fits: the smallest takes .* take smaller pictures"):
        chosen(300)
    with pytest.raises(PlanError, match="no placement fits"):
        chosen(2000, mode="resident")


def test_the_peak_of_a_call_is_that_of_its_tensors() -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 2  # 1 MiB, beside z at the peak
            z = torch.cat([y, y])
            del y
            return z.sum(0) + 1

    x = torch.empty(1024, 256, device="meta")
    assert peak_of(record_call(Net(), {"x": x}, fused_attention=True)) == 3 * 2**20
    query = {"query": torch.empty(1, 1, 512, 64, device="meta")}

    def attend(query: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, query, query)

    fused, plain = (peak_of(record_call(nn.Identity(), query, fused, attend)) for fused in (True, False))
    assert fused == 512 * 64 * 4 and plain > 512 * 512 * 4


def test_a_folder_and_a_pipeline_give_the_same_plan(tiny_sd: StableDiffusionPipeline, tiny_sd_dir: Path) -> None:
    plans = [
        plan_memory(source, CPU, Request(64, 64), torch.float32, limit=2**30, mode="stream")
        for source in (tiny_sd_dir, tiny_sd)
    ]
    assert plans[0].phases == plans[1].phases and plans[0].buffers == plans[1].buffers
    assert {p.name: p.weights for p in plans[0].placements} == {
        name: bytes_of(getattr(tiny_sd, name)) for name in ("text_encoder", "unet", "vae")
    }
    assert not plans[0].unknown


def test_a_pipeline_is_planned_as_it_is_whatever_moves_or_compiles_it(
    tiny_sd: StableDiffusionPipeline, tmp_path: Path
) -> None:
    def plan(mode: str = "resident") -> MemoryPlan:
        return plan_memory(tiny_sd, CPU, Request(64, 64), torch.float32, mode=mode, limit=2**30)

    plain = plan()
    for module in (tiny_sd.text_encoder, tiny_sd.unet):
        stream_module(module, CPU)
    lend_module(tiny_sd.vae.decoder, CPU)
    expected = draw(tiny_sd)
    assert plan() == plain
    assert torch.equal(draw(tiny_sd), expected) and tiny_sd.unet._hf_hook.statistics.loads > 0
    compile_pipeline(tiny_sd, tmp_path)  # blocks
    assert plan() == plain and is_compiled(tiny_sd.unet)
    for module in (tiny_sd.text_encoder, tiny_sd.unet, tiny_sd.vae.decoder):
        stop_streaming(module)
    compile_pipeline(tiny_sd, tmp_path)
    assert plan() == plain and is_compiled(tiny_sd.unet)


def test_a_model_whose_dry_run_fails_is_named(tiny_sd: StableDiffusionPipeline) -> None:
    class Looks(torch.nn.Identity):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum().item() else x

    tiny_sd.unet.conv_act = Looks()
    with pytest.raises(
        PlanError, match="the unet cannot be planned, as a dry run of it on the meta device fails: .*item"
    ):
        plan_memory(tiny_sd, CPU, Request(64, 64), torch.float32, limit=2**30)


@pytest.mark.parametrize("mode", ["resident", "stream", "disk"])
def test_a_pipeline_runs_as_planned_and_comes_back(
    tiny_sd: StableDiffusionPipeline, tiny_sd_dir: Path, mode: str
) -> None:
    expected = draw(tiny_sd)
    plan = plan_memory(tiny_sd_dir, CPU, Request(128, 128), torch.float32, 2, mode, 2**30)
    for _ in range(2):
        apply_plan(tiny_sd, plan, CPU, tiny_sd_dir)
        assert torch.equal(draw(tiny_sd), expected)
    tiny_sd.remove_all_hooks()
    assert torch.equal(draw(tiny_sd), expected)


def test_the_program_prints_a_plan_or_one_line(tiny_sd_dir: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ascend.planner", *arguments]
        return subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, env=environment(), cwd=ROOT
        )

    plan = json.loads(run(tiny_sd_dir, "--device", "cpu", "--memory", "stream", "--json").stdout)
    assert plan["placements"][1]["where"] == STREAMED and plan["peak"] == max(plan["phases"].values())
    refused = run(tiny_sd_dir, "--device", "npu")
    *_, line = refused.stderr.splitlines()
    assert refused.returncode == 2 and line.startswith("error: device 'npu' is not there")


def test_what_is_refused_is_one_line(tiny_sd_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([tmp_path], "model_index.json"),
        ([tiny_sd_dir, "--memory_limit", "1KiB"], "no placement fits"),  # less than a block
        ([tiny_sd_dir, "--memory_limit", "much"], "must be a size as 8GiB, not 'much'"),
    ):
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in (*arguments, "--device", "cpu")])
        *_, line = capsys.readouterr().err.splitlines()
        assert exit.value.code == 2 and line.startswith("error: ") and message in line


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json"])
def test_a_broken_configuration_is_one_line(
    tiny_sd_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    folder = shutil.copytree(tiny_sd_dir, tmp_path / "model")
    (folder / file).write_text("{")
    with pytest.raises(SystemExit):
        main([str(folder), "--device", "cpu"])
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and str(folder / file) in line


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("model_index.json", "[1]", "must hold an object, not a list"),
        ("model_index.json", "{}", "names no model"),
        ("text_encoder/config.json", '{"hidden_size": "a"}', "has no configuration of a CLIPTextModel"),
    ],
)
def test_a_folder_of_something_else_is_one_line(
    tiny_sd_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, text: str, message: str
) -> None:
    folder = shutil.copytree(tiny_sd_dir, tmp_path / "model")
    (folder / file).write_text(text)
    with pytest.raises(SystemExit):
        main([str(folder), "--device", "cpu"])
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize("argument", ["--steps", "--batch", "--height", "--width"])
@pytest.mark.parametrize("value", ["0", "-8", "x"])
def test_a_number_that_cannot_be_is_one_line(
    tiny_sd_dir: Path, capsys: pytest.CaptureFixture[str], argument: str, value: str
) -> None:
    with pytest.raises(SystemExit):
        main([str(tiny_sd_dir), argument, value])
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: argument {argument}: must be a whole number from 1, not '{value}'")


def test_a_safety_checker_is_planned_and_runs_after_the_picture(tiny_sd: StableDiffusionPipeline) -> None:
    tiny_sd.register_modules(safety_checker=torch.nn.Linear(4, 4))
    plan = plan_memory(tiny_sd, CPU, Request(64, 64), torch.float32, mode="stream", limit=2**30)
    assert plan.where("safety_checker") == "resident" and "safety_checker" in plan.unknown
    assert plan.where("of another library") == "while it runs"


def test_weights_of_8_bits_are_counted_as_such(tiny_sd: StableDiffusionPipeline) -> None:
    def weights() -> dict[str, int]:
        plan = plan_memory(tiny_sd, CPU, Request(64, 64), torch.float32, limit=2**30)
        assert not plan.unknown and plan.peak > sum(p.weights for p in plan.placements)
        return {p.name: p.weights for p in plan.placements}

    plain = weights()
    quantize_weights(tiny_sd.unet)
    small = weights()
    assert small["unet"] == bytes_of(tiny_sd.unet) < plain["unet"]
    assert tiny_sd.unet.device == CPU  # the dry run is of a copy
