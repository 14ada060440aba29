"""A pipeline as graphs: the pictures of eager mode, one graph for each kind of call, none to compile a second time.

And the graphs on disk, which processes share: each is made once, and is of the module that it is used for.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch_npu
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from peft import LoraConfig
from PIL import Image
from torch import nn

from ascend.graphs import torchair as backend
from ascend.graphs.compile import compile_module, compile_pipeline, decompile_pipeline
from processors import disable_token_merging, enable_flash_attention, enable_token_merging
from tests.on_npu.helpers import SATURATES
from tests.programs import ROOT, environment

HALF = torch.float16 if SATURATES else torch.bfloat16
ND, FRACTAL_NZ = 2, 29
PROMPTS = ("a red circle", "a blue square", "two green stars")


def load(folder: Path, npu: torch.device) -> StableDiffusionPipeline:
    """Without a trace of what was compiled before."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=HALF).to(npu)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(small_sd_dir: Path, npu: torch.device) -> StableDiffusionPipeline:
    return load(small_sd_dir, npu)


@pytest.fixture(scope="module")
def kept_graphs(small_sd_dir: Path, npu: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    pipe = load(small_sd_dir, npu)
    enable_flash_attention(pipe)
    compile_pipeline(pipe, folder)
    draw(pipe, PROMPTS[0])
    return folder


@pytest.fixture
def graphs(kept_graphs: Path, tmp_path: Path) -> Path:
    """A folder that has the graphs of the pipeline with fused kernels: what a test of later ones need not compile."""
    return shutil.copytree(kept_graphs, tmp_path / "graphs")


def draw(pipe: StableDiffusionPipeline, prompt: str, size: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 3, "cache_interval": 2, "num_images_per_prompt": 2, "output_type": "pt"}
    return pipe(prompt, height=size, width=size, generator=generator, **options).images.cpu().float()


@pytest.mark.parametrize(("model", "merging"), [("small_sd_dir", False), ("tiny_sd_dir", True)])
def test_graphs_draw_what_eager_does_without_a_break_or_recompilation(
    npu: torch.device, model: str, merging: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The larger UNet has the levels of Stable Diffusion's."""
    pipe = load(request.getfixturevalue(model), npu)
    counters = torch._dynamo.utils.counters
    enable_flash_attention(pipe)
    if merging:
        enable_token_merging(pipe, ratio=0.5)
    eager = [draw(pipe, prompt) for prompt in PROMPTS]
    assert set(compile_pipeline(pipe, tmp_path).values()) == {"torchair"}
    linear = [module for module in pipe.unet.modules() if isinstance(module, nn.Linear)]
    assert {torch_npu.get_npu_format(module.weight) for module in linear} == {FRACTAL_NZ}

    graphs = [draw(pipe, prompt) for prompt in PROMPTS]
    for graph, plain in zip(graphs, eager, strict=True):
        assert (graph - plain).abs().mean() < (0.01 if SATURATES else 0.03)
    assert counters["stats"]["unique_graphs"] == 4  # text encoder, full UNet, shallow UNet, VAE decoder
    assert not counters["graph_break"]
    assert pipe.unet.forward.compilations == 2


def test_graphs_are_found_again(
    pipe: StableDiffusionPipeline, small_sd_dir: Path, npu: torch.device, tmp_path: Path
) -> None:
    enable_flash_attention(pipe)
    enable_token_merging(pipe)
    compile_pipeline(pipe, tmp_path)
    picture = draw(pipe, PROMPTS[0])
    again = load(small_sd_dir, npu)
    enable_flash_attention(again)
    enable_token_merging(again)
    compile_pipeline(again, tmp_path)
    assert torch.equal(draw(again, PROMPTS[0]), picture)
    components = (again.text_encoder, again.unet, again.vae.decoder)
    assert [module.forward.compilations for module in components] == [0, 0, 0]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def test_a_size_seen_before_is_not_compiled_again(pipe: StableDiffusionPipeline, graphs: Path) -> None:
    enable_flash_attention(pipe)
    compile_pipeline(pipe, graphs)
    for size in (96, 64, 96):
        draw(pipe, PROMPTS[0], size)
    assert pipe.unet.forward.compilations == 2


def add_adapter(pipe: StableDiffusionPipeline) -> None:
    torch.manual_seed(1)
    pipe.unet.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q"]))


def scale_weights(pipe: StableDiffusionPipeline) -> None:
    pipe.unet.load_state_dict({name: tensor.cpu() * 1.1 for name, tensor in pipe.unet.state_dict().items()})


CHANGES: dict[str, Callable[[StableDiffusionPipeline], object]] = {
    "merging": enable_token_merging,
    "merging is over": disable_token_merging,
    "an adapter": add_adapter,
    "other weights": scale_weights,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_compiling_is_seen(pipe: StableDiffusionPipeline, change: str, graphs: Path) -> None:
    enable_flash_attention(pipe)
    if change == "merging is over":
        enable_token_merging(pipe)
        shutil.rmtree(graphs)  # which have what comes then
    compile_pipeline(pipe, graphs)
    before, made = draw(pipe, PROMPTS[0]), pipe.unet.forward.compilations
    CHANGES[change](pipe)
    graph = draw(pipe, PROMPTS[0])
    assert change == "other weights" or pipe.unet.forward.compilations > made  # a graph on disk reads weights anew
    decompile_pipeline(pipe)
    eager = draw(pipe, PROMPTS[0])
    assert (graph - eager).abs().mean() < (0.01 if SATURATES else 0.03)
    # Half of it or less on 310P; bfloat16 rounds a tiny model's pictures by nearly as much as the change does.
    assert (graph - eager).abs().mean() < (before - eager).abs().mean()


def formats(pipe: StableDiffusionPipeline) -> list[int]:
    parts = (pipe.text_encoder, pipe.unet, pipe.vae)
    return [torch_npu.get_npu_format(parameter) for part in parts for parameter in part.parameters()]


def allows_private_formats() -> bool:
    """What an eager convolution is told, by the format of its result."""
    weight = torch.ones(16, 16, 1, 1, dtype=torch.float16, device="npu")
    return torch_npu.get_npu_format(torch_npu.npu_format_cast(weight, 4)) != ND


def test_decompiling_puts_formats_and_settings_back(pipe: StableDiffusionPipeline, graphs: Path) -> None:
    enable_flash_attention(pipe)
    before, eager, allowed = formats(pipe), draw(pipe, PROMPTS[0]), allows_private_formats()
    compile_pipeline(pipe, graphs)
    draw(pipe, PROMPTS[0])
    assert formats(pipe) != before
    decompile_pipeline(pipe)
    assert formats(pipe) == before
    assert allows_private_formats() == allowed
    assert all(parameter.requires_grad for parameter in pipe.unet.parameters())
    assert torch.equal(draw(pipe, PROMPTS[0]), eager)


def test_a_missing_package_is_noticed_before_any_weight_is_touched(
    pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing() -> None:
        raise ModuleNotFoundError("No module named 'attrs'")

    before = formats(pipe)
    monkeypatch.setattr(backend, "make_config", missing)
    with pytest.raises(ModuleNotFoundError):
        compile_pipeline(pipe, tmp_path)
    assert formats(pipe) == before
    assert "forward" not in vars(pipe.text_encoder)


def test_two_pipelines_that_share_a_unet_may_both_be_compiled(pipe: StableDiffusionPipeline, graphs: Path) -> None:
    enable_flash_attention(pipe)
    compile_pipeline(pipe, graphs)
    first = draw(pipe, PROMPTS[0])
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe, torch_dtype=HALF)  # float32, else, for both
    other.set_progress_bar_config(disable=True)
    assert set(compile_pipeline(other, graphs).values()) == {"torchair"}
    other("a cat", image=Image.new("RGB", (64, 64)), num_inference_steps=2, strength=1.0)
    assert torch.equal(draw(pipe, PROMPTS[0]), first)


# Compiles a small module, changes it, calls it, and prints how many graphs it made and what came out.
PROGRAM = textwrap.dedent(
    """
    import sys
    from pathlib import Path

    import torch
    from torch import nn

    from ascend.device import DeviceManager
    from ascend.graphs.compile import compile_module


    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16, bias=False)
            self.scale = 1

        def forward(self, x):
            return self.layer(x) * self.scale


    module = Scaled().half().to(DeviceManager("npu").device)
    nn.init.ones_(module.layer.weight)
    compile_module(module, Path(sys.argv[1]))
    module.scale = int(sys.argv[2])
    with torch.no_grad():
        result = module(torch.ones(1, 16).half().to(module.layer.weight.device))
    print(module.forward.compilations, int(result[0, 0]))
    """
)


def start(program: Path, cache: Path, scale: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, program, cache, str(scale)], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )


def test_processes_share_the_graph_of_the_module_that_was_called_not_of_the_one_that_was_wrapped(
    tmp_path: Path,
) -> None:
    """Two that start together change the module between compiling and calling; the third one must not get theirs."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    together = [start(program, tmp_path / "graphs", scale=2) for _ in range(2)]
    assert sorted(process.communicate()[0].split() for process in together) == [["0", "32"], ["1", "32"]]
    assert start(program, tmp_path / "graphs", scale=1).communicate()[0].split() == ["1", "16"]


def test_the_same_module_is_kept_in_each_folder_it_is_compiled_into(npu: torch.device, tmp_path: Path) -> None:
    """In one process; with other weights, of which a graph on disk knows nothing."""
    x = torch.ones(1, 8, device=npu)
    for seed, folder in ((0, "first"), (1, "second"), (2, "second")):
        torch.manual_seed(seed)
        module = torch.nn.Linear(8, 8).to(npu).eval()
        with torch.no_grad():
            expected = module(x).cpu()
            compile_module(module, tmp_path / folder)
            torch.testing.assert_close(module(x).cpu(), expected, rtol=1e-3, atol=1e-3)
        assert list((tmp_path / folder).rglob("compiled_module"))
