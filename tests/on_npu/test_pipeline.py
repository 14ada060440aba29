"""The demo model on the NPU: the pictures of the CPU, within the rounding of the dtype."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from ascend.device import DeviceManager
from processors import enable_flash_attention, enable_token_merging
from tests.on_npu.helpers import FLOATS
from tests.programs import ROOT

DEMO_MODEL = ROOT / "examples/sd2.1/demo_model"
PROMPT = "a large green cross at the top and a small purple circle at the bottom on a grey background"
STEPS = 4
# Between two orders of summation, after a few steps: the mean difference of 8-bit colours, of 255. Half precision
# rounds every layer, so the difference is that of a few units in the last place of the latents.
TOLERANCES = {torch.float32: 1.0, torch.float16: 1.5, torch.bfloat16: 6.0}


def draw(device: torch.device, dtype: torch.dtype, accelerated: bool) -> np.ndarray:
    pipe = StableDiffusionPipeline.from_pretrained(DEMO_MODEL, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    cache = {}
    if accelerated:
        enable_flash_attention(pipe)
        enable_token_merging(pipe, ratio=0.5)
        cache = {"cache_interval": 3}
    generator = DeviceManager(device).create_generator(0)
    call = {"num_inference_steps": STEPS, "guidance_scale": 1.5, "generator": generator, "output_type": "np", **cache}
    return pipe(PROMPT, **call).images[0] * 255


@pytest.mark.parametrize("accelerated", (False, True))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_picture_is_that_of_the_cpu(npu: torch.device, dtype: torch.dtype, accelerated: bool) -> None:
    there, here = draw(npu, dtype, accelerated), draw(torch.device("cpu"), dtype, accelerated)
    assert here.std() > 10  # there is something on it
    assert np.abs(there - here).mean() < TOLERANCES[dtype]


def test_the_runner(npu: torch.device, chip: str, tmp_path: Path) -> None:
    runner = [sys.executable, ROOT / "examples/sd2.1/run_sd.py", "--device", "npu", "--FA", "--TOME", "--DC"]
    arguments = ["--steps", "3", "--prompt", PROMPT, "--output_dir", tmp_path]
    subprocess.run([*runner, *arguments], check=True, capture_output=True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["device"]["chip"] == chip
    kernel = "prompt" if chip.startswith("Ascend310P") else "fused_infer"
    assert kernel in report["flags"]["FA"]["kernel"]
