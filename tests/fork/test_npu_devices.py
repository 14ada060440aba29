"""What diffusers does for "cuda" because the device is an accelerator, it does for "npu"."""

import subprocess
import sys
from pathlib import Path

from tests.programs import ROOT


def move_to_npu(model: Path, offload: str) -> subprocess.CompletedProcess[str]:
    """Offloads the pipeline saved in `model` by its method `offload` and moves it to "npu", in another interpreter.

    torch has a name to give to an accelerator of someone else; called "npu" it can be moved to, which fails there.
    """
    code = (
        "import torch\n"
        "from diffusers import StableDiffusionPipeline\n"
        f"pipe = StableDiffusionPipeline.from_pretrained({str(model)!r})\n"
        f"pipe.{offload}(device='cpu')\n"
        "torch.utils.rename_privateuse1_backend('npu')\n"
        "pipe.to('npu')"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_moving_a_sequentially_offloaded_pipeline_to_npu_is_an_error(tiny_sd_dir: Path) -> None:
    result = move_to_npu(tiny_sd_dir, "enable_sequential_cpu_offload")
    assert "ValueError: It seems like you have activated sequential model offloading" in result.stderr


def test_moving_a_model_offloaded_pipeline_to_npu_warns(tiny_sd_dir: Path) -> None:
    result = move_to_npu(tiny_sd_dir, "enable_model_cpu_offload")
    assert "It seems like you have activated model offloading" in result.stderr
