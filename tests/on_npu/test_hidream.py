"""HiDream's layers on an NPU: mixtures of experts without a wait for the device."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import HiDreamImageEditingPipeline
from PIL import Image

from ascend import compile_module, compile_pipeline, decompile_module, decompile_pipeline
from processors import disable_step_cache, enable_fused_kernels, enable_step_cache, load_adapter
from processors.models.hidream import fuse
from processors.step_cache import computed_blocks
from runners.hidream import run as program
from runners.hidream.arguments import E1_1
from tests.hidream_adapters import add_adapter, full_of, save_original
from tests.on_npu.helpers import SATURATES
from tests.processors.models.test_hidream import make_moe, predict
from tests.programs import environment
from tests.tiny_hidream import LAYERS, SINGLE_LAYERS, make_components, make_transformer

HALF = torch.float16


def test_experts_compute_what_upstream_computes(npu: torch.device) -> None:
    moe, x = make_moe(), torch.randn(2, 37, 32)
    with torch.no_grad():
        expected = moe(x)
        moe.to(npu, HALF)
        fuse(moe)
        found = moe(x.to(npu, HALF))
    assert (found.cpu().float() - expected).abs().max() < 2e-3  # float16, of values up to 0.7


def test_experts_do_not_wait_for_the_device(npu: torch.device) -> None:
    moe, x = make_moe().to(npu, HALF), torch.randn(2, 37, 32).to(npu, HALF)
    fuse(moe)
    torch.npu.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            moe(x)
    finally:
        torch.npu.set_sync_debug_mode("default")


def test_an_edit_of_graphs_is_that_of_eager_mode(npu: torch.device, tmp_path: Path) -> None:
    pipe = HiDreamImageEditingPipeline(**make_components()).to(npu, HALF)
    pipe.set_progress_bar_config(disable=True)
    refiner = make_transformer(seed=7).to(npu, HALF)
    for model in (pipe, refiner):
        enable_fused_kernels(model)

    def edit() -> torch.Tensor:
        options = {"num_inference_steps": 4, "refine_strength": 0.5, "refiner": refiner, "max_sequence_length": 16}
        generator = torch.Generator().manual_seed(0)
        image = Image.new("RGB", (48, 80), "red")
        return pipe("make it blue", image=image, generator=generator, output_type="latent", **options).images.cpu()

    expected = edit()
    assert compile_pipeline(pipe, tmp_path) == dict.fromkeys(("transformer", "vae.encoder", "vae.decoder"), "torchair")
    assert compile_module(refiner, tmp_path) == "torchair"
    found = edit()
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()  # float16, summed in another order
    decompile_module(refiner)
    decompile_pipeline(pipe)
    assert torch.equal(edit(), expected)


def test_a_step_cache_leaves_blocks_out_of_graphs(npu: torch.device, tmp_path: Path) -> None:
    pipe = HiDreamImageEditingPipeline(**make_components()).to(npu, HALF)
    pipe.set_progress_bar_config(disable=True)
    enable_fused_kernels(pipe)

    def edit() -> torch.Tensor:
        options = {"num_inference_steps": 6, "max_sequence_length": 16, "output_type": "latent"}
        generator = torch.Generator().manual_seed(0)
        return pipe("make it blue", image=Image.new("RGB", (48, 80), "red"), generator=generator, **options).images

    plain = edit()
    enable_step_cache(pipe, "taylorseer", 3)
    expected = edit()
    assert not torch.equal(expected, plain)
    disable_step_cache(pipe)
    assert "graph for each of 2 kinds of block" in compile_module(pipe.transformer, tmp_path, by_block=True)
    enable_step_cache(pipe, "taylorseer", 3)
    found = edit()
    assert computed_blocks(pipe.transformer) == [4] * (LAYERS + SINGLE_LAYERS)
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()  # float16, summed in another order
    disable_step_cache(pipe)
    decompile_module(pipe.transformer)
    assert torch.equal(edit(), plain)


@pytest.mark.parametrize(("name", "value", "waits"), [("taylorseer", 2, False), ("first_block", 1.0, True)])
def test_first_block_waits_and_taylorseer_does_not(npu: torch.device, name: str, value: float, waits: bool) -> None:
    transformer = make_transformer().to(npu, HALF)
    enable_fused_kernels(transformer)
    enable_step_cache(transformer, name, value)
    call = {
        name: tensor.to(npu, HALF)
        for name, tensor in {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "timesteps": torch.tensor([500.0, 500.0]),
            "encoder_hidden_states_t5": torch.randn(2, 6, 24),
            "encoder_hidden_states_llama3": torch.randn(2, 2, 6, 20),
            "pooled_embeds": torch.randn(2, 64),
        }.items()
    }
    with torch.no_grad(), transformer.cache_context("edit"):
        for _ in range(3):
            transformer(**call)
        torch.npu.set_sync_debug_mode("error")
        try:
            with pytest.raises(RuntimeError, match="synchroniz") if waits else nullcontext():
                for _ in range(4):  # full ones and others
                    transformer(**call)
        finally:
            torch.npu.set_sync_debug_mode("default")


def test_an_adapter_edits_and_is_off_while_refining(npu: torch.device, tmp_path: Path) -> None:
    bare = make_transformer()
    file = save_original(tmp_path / "edit.safetensors", add_adapter(make_transformer()), full_of(bare))
    pipe = HiDreamImageEditingPipeline(**make_components()).to(npu, HALF)
    pipe.set_progress_bar_config(disable=True)
    enable_fused_kernels(pipe)

    def edit(**options: Any) -> torch.Tensor:
        options |= {"num_inference_steps": 4, "max_sequence_length": 16, "output_type": "latent"}
        generator = torch.Generator().manual_seed(0)
        return pipe("make it blue", image=Image.new("RGB", (48, 80), "red"), generator=generator, **options).images

    plain, refiner = edit(), copy.deepcopy(pipe.transformer)
    load_adapter(pipe, file, "edit")
    edited, expected = edit(), edit(refine_strength=0.5, refiner=refiner)
    assert torch.equal(edit(refine_strength=0.5), expected) and not torch.equal(edited, expected)
    compile_module(pipe.transformer, tmp_path)
    for _ in range(2):
        found = edit(refine_strength=0.5)
        assert (found - expected).abs().max() < 0.02 * expected.abs().max()  # float16, summed in another order
    assert pipe.transformer.forward.compilations == 2
    decompile_module(pipe.transformer)
    assert torch.equal(edit(), edited)
    pipe.unload_lora_weights()
    assert torch.equal(edit(), plain)


def test_adapters_on_experts_are_those_of_the_cpu(npu: torch.device, tmp_path: Path) -> None:
    pipe = HiDreamImageEditingPipeline(**make_components())
    load_adapter(pipe, save_original(tmp_path / "a.safetensors", add_adapter(make_transformer()), {}), "a")
    moe, x = pipe.transformer.single_stream_blocks[0].block.ff_i, torch.randn(2, 37, 32)
    with torch.no_grad():
        expected = moe(x)
        moe.to(npu, HALF)
        fuse(moe)
        on_npu = x.to(npu, HALF)
        torch.npu.set_sync_debug_mode("error")
        try:
            found = moe(on_npu)
        finally:
            torch.npu.set_sync_debug_mode("default")
    found = found.cpu().float()
    assert (found - expected).abs().median() < 0.01 * expected.abs().median()


def test_three_rounds_leave_memory_where_it_was_after_the_first(npu: torch.device) -> None:
    pipe = HiDreamImageEditingPipeline(**make_components()).to(npu, HALF)
    pipe.set_progress_bar_config(disable=True)
    refiner = make_transformer(seed=7).to(npu, HALF)
    for model in (pipe, refiner):
        enable_fused_kernels(model)
    image = Image.new("RGB", (48, 80), "red")
    allocated, peaks = [], []
    for _ in range(3):
        torch.npu.reset_peak_memory_stats()
        pipe("make it blue", image=image, num_inference_steps=2, refine_strength=0.5, refiner=refiner)
        allocated.append(torch.npu.memory_allocated())
        peaks.append(torch.npu.max_memory_allocated())
    assert allocated[1:] == allocated[:1] * 2 and peaks[1] == peaks[2]


def test_memory_that_runs_out_in_the_middle_loses_nothing(npu: torch.device) -> None:
    pipe = HiDreamImageEditingPipeline(**make_components()).to(npu, HALF)
    pipe.set_progress_bar_config(disable=True)
    refiner = make_transformer(seed=7).to(npu, HALF)
    for model in (pipe, refiner):
        enable_fused_kernels(model)

    def edit(**options: Any) -> torch.Tensor:
        return pipe(
            "make it blue",
            image=Image.new("RGB", (48, 80), "red"),
            num_inference_steps=4,
            refine_strength=0.5,
            refiner=refiner,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **options,
        ).images.cpu()

    def starve(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2:  # while it refines
            torch.npu.empty_cache()
            torch.npu.set_per_process_memory_fraction(1e-6)
        return tensors

    expected = edit()
    before = torch.npu.memory_allocated()
    try:
        with pytest.raises(torch.OutOfMemoryError):
            edit(callback_on_step_end=starve)
    finally:
        torch.npu.set_per_process_memory_fraction(1.0)
    assert torch.npu.memory_allocated() == before
    assert torch.equal(edit(), expected)


def test_a_transformer_predicts_what_it_does_on_the_cpu(npu: torch.device) -> None:
    model = make_transformer()
    expected = predict(model)
    on_npu = copy.deepcopy(model).to(npu)
    enable_fused_kernels(on_npu)
    found = predict(on_npu, device=npu).cpu()
    # 310P multiplies float32 in float16, and a token may go to another expert for it: so not the largest difference.
    assert (found - expected).abs().median() < 0.01 * expected.abs().median()


def test_the_runner_keeps_t5_with_the_host_where_the_chip_clips(
    npu: torch.device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the residual stream in float32; the picture is that of the CPU, but for float16."""
    folder = tmp_path / "model"
    HiDreamImageEditingPipeline(**make_components()).save_pretrained(folder)
    (folder / "defaults.json").write_text(json.dumps({"side": 64}))
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    given = ["--model_path", folder, "--image", tmp_path / "red.png", "--instruction", "make it blue", "--steps", 3]
    given += ["--refine_strength", 0, "--residual_dtype", "float32", "--FA"]
    for name, options in (("npu", ["--dtype", "float16"]), ("cpu", ["--device", "cpu"])):
        arguments = [str(a) for a in [*given, *options, "--output_dir", tmp_path / name]]
        program.main("inference_e1_1_npu.py", "", E1_1, tmp_path, arguments)
    assert ("T5 reads texts with the host" in capsys.readouterr().out) == SATURATES
    found, expected = (np.asarray(Image.open(tmp_path / name / "red.png")).astype(float) for name in ("npu", "cpu"))
    assert np.abs(found - expected).mean() < 3  # of 255; random weights


LAUNCHES = """
import sys
from pathlib import Path
import torch
from ascend import compile_module
from ascend.device import DeviceManager
from processors import enable_fused_kernels
from tests.processors.models.test_hidream import predict
from tests.tiny_hidream import make_transformer

transformer = make_transformer(head_dim=64)
for parameter in transformer.parameters():
    parameter.data.mul_(0.3)  # or float16 overflows
expected = predict(transformer)
npu = DeviceManager("npu").device
transformer.to(npu, torch.float16)
enable_fused_kernels(transformer)
if sys.argv[1] == "graph":
    compile_module(transformer, Path(sys.argv[2]))
found = predict(transformer, device=npu, dtype=torch.float16)
error = (found.cpu().float() - expected).norm() / expected.norm()
assert error < 0.03, error  # float16
"""


@pytest.mark.skipif(not os.environ.get("CANN_EMULATOR_SOC"), reason="the trace is the emulator's")
@pytest.mark.parametrize("mode", ("eager", "graph"))
def test_a_step_is_of_the_chips_operators(mode: str, tmp_path: Path) -> None:
    script, path = tmp_path / "step.py", tmp_path / "trace.jsonl"
    script.write_text(LAUNCHES)
    settings = environment(CANN_EMULATOR_TRACE=str(path))
    subprocess.run([sys.executable, script, mode, str(tmp_path / "graphs")], check=True, env=settings)
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert not any(event["event"] == "fallback" for event in events)
    launches = Counter(event["operator"] for event in events if event["event"] == "launch")
    blocks = LAYERS + SINGLE_LAYERS
    products = sum(count for name, count in launches.items() if name.startswith("GroupedMatmul"))
    assert products == 2 * blocks, launches
    assert launches["ApplyRotaryPosEmbV2"] + launches["ApplyRotaryPosEmb"] == blocks
    assert launches["RmsNorm"] == 2 * (blocks + LAYERS)  # a block of two streams norms both
