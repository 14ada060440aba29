"""Having torch_npu installed changes nothing for CPU tensors, whether it can be imported or not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import HiDreamImageTransformer2DModel, UNet2DConditionModel

from tests.programs import ROOT

WITHOUT_CANN = "libhccl.so: cannot open shared object file: No such file or directory"
WHEEL = pytest.param("wheel", marks=pytest.mark.slow)


def run_beside(site: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a new interpreter that finds the packages of `site` first, and that no CANN is configured for."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("ASCEND", "LD_LIBRARY_PATH"))}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    env["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)


def install_torch_npu(site: Path, source: str) -> Path:
    """A package called torch_npu, version 2.13.0, whose code is `source`."""
    (site / "torch_npu").mkdir(parents=True)
    (site / "torch_npu" / "__init__.py").write_text(source)
    metadata = site / "torch_npu-2.13.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
    return site


@pytest.fixture(params=["ImportError", "OSError", "RuntimeError", WHEEL])
def without_cann(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with a torch_npu that fails to import, as torch_npu does without CANN; the slow one is the real one."""
    if request.param != "wheel":
        return install_torch_npu(tmp_path, f"raise {request.param}({WITHOUT_CANN!r})")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(tmp_path), "torch_npu==2.13.0"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("torch_npu 2.13.0 cannot be installed here")
    return tmp_path


@pytest.fixture
def without_kernels(tmp_path: Path) -> Path:
    """A folder with a torch_npu that imports, and in which whoever looks for a kernel finds none."""
    return install_torch_npu(tmp_path, "")


def unet_noise(model: Path) -> torch.Tensor:
    """One pass of the UNet in the saved pipeline `model`, with weights and inputs that are the same at each call."""
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 16, 16, generator=generator)
    text = torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        return unet(sample, 500.0, text).sample


def tiny_hidream() -> HiDreamImageTransformer2DModel:
    torch.manual_seed(0)
    return HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[32, 16],
        text_emb_dim=64,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
    ).eval()


def hidream_noise(transformer: HiDreamImageTransformer2DModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(1, 4, 32, 32, generator=generator),
            timesteps=torch.tensor([500.0]),
            encoder_hidden_states_t5=torch.randn(1, 8, 32, generator=generator),
            encoder_hidden_states_llama3=torch.randn(2, 1, 8, 16, generator=generator),
            pooled_embeds=torch.randn(1, 64, generator=generator),
        ).sample


def test_a_torch_npu_that_fails_to_import_counts_as_absent(without_cann: Path) -> None:
    result = run_beside(
        without_cann,
        "import diffusers.models.activations, diffusers.models.normalization, diffusers.models.attention_processor\n"
        "from diffusers.models import attention_dispatch\n"
        "from diffusers.utils import is_torch_npu_available\n"
        "from diffusers.utils.torch_utils import get_device\n"
        "print(is_torch_npu_available(), attention_dispatch._CAN_USE_NPU_ATTN, get_device())",
    )
    assert result.stdout.split() == ["False", "False", "cpu"], result.stderr
    assert result.stderr.count(f"torch_npu is installed but failed to import: {WITHOUT_CANN}") == 1


@pytest.mark.parametrize("without_cann", ["ImportError", WHEEL], indirect=True)
@pytest.mark.parametrize("first", ["import diffusers", "import torch_npu"])
def test_the_reason_why_torch_npu_is_absent_survives_in_either_order(without_cann: Path, first: str) -> None:
    result = run_beside(
        without_cann,
        f"try:\n    {first}\nexcept (ImportError, OSError, RuntimeError):\n    pass\n"
        "from diffusers import StableDiffusionPipeline\n"
        "from diffusers.utils.import_utils import is_torch_npu_available, torch_npu_import_error\n"
        "print(is_torch_npu_available(), torch_npu_import_error())",
    )
    assert result.stdout.splitlines()[-1:] == [f"False {WITHOUT_CANN}"], result.stderr


def test_there_is_no_reason_where_torch_npu_imports(without_kernels: Path) -> None:
    result = run_beside(
        without_kernels,
        "from diffusers.utils.import_utils import is_torch_npu_available, torch_npu_import_error\n"
        "print(is_torch_npu_available(), torch_npu_import_error())",
    )
    assert result.stdout.split() == ["True", "None"], result.stderr


@pytest.mark.parametrize("without_cann", ["ImportError", WHEEL], indirect=True)
def test_pipelines_import_beside_a_torch_npu_without_cann(without_cann: Path, tiny_sd_dir: Path) -> None:
    result = run_beside(
        without_cann,
        "import torch\n"
        "import diffusers.training_utils\n"
        "from diffusers import StableDiffusionPipeline\n"
        "from tests.fork.test_npu_guards import unet_noise\n"
        f"torch.save(unet_noise({str(tiny_sd_dir)!r}), {str(without_cann / 'noise.pt')!r})",
    )
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(without_cann / "noise.pt"), unet_noise(tiny_sd_dir))


def test_torch_npu_is_imported_before_the_accelerator_is_detected(without_kernels: Path) -> None:
    result = run_beside(
        without_kernels,
        "import sys, torch\n"
        "is_available = torch.accelerator.is_available\n"
        "torch.accelerator.is_available = lambda: print('torch_npu' in sys.modules) or is_available()\n"
        "import diffusers.utils.torch_utils",
    )
    assert result.stdout.split() == ["True"], result.stderr


def test_cpu_forwards_call_no_npu_kernel(without_kernels: Path, tiny_sd_dir: Path) -> None:
    result = run_beside(
        without_kernels,
        "import torch\n"
        "from diffusers.models.normalization import RMSNorm\n"
        "from diffusers.utils import is_torch_npu_available\n"
        "from tests.fork.test_npu_guards import hidream_noise, tiny_hidream, unet_noise\n"
        "hidream = tiny_hidream()\n"
        "hidream.enable_npu_flash_attention()\n"
        "norm = RMSNorm(8, eps=1e-6)(torch.arange(8.0))\n"
        f"outputs = [norm, unet_noise({str(tiny_sd_dir)!r}), hidream_noise(hidream)]\n"
        f"torch.save(outputs, {str(without_kernels / 'outputs.pt')!r})\n"
        "print(is_torch_npu_available())",
    )
    assert result.stdout.split() == ["True"], result.stderr
    norm, unet, hidream = torch.load(without_kernels / "outputs.pt")
    torch.testing.assert_close(norm, torch.nn.functional.rms_norm(torch.arange(8.0), (8,), eps=1e-6))
    assert torch.equal(unet, unet_noise(tiny_sd_dir))
    assert torch.equal(hidream, hidream_noise(tiny_hidream()))


def test_switching_npu_flash_attention_keeps_hidream_working() -> None:
    transformer = tiny_hidream()
    before = hidream_noise(transformer)
    transformer.disable_npu_flash_attention()
    assert torch.equal(hidream_noise(transformer), before)
