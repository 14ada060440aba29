"""DeepCache, the projected prompt and host timesteps in each of Stable Diffusion's pipelines."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import MultiControlNetModel

from tests.programs import ROOT
from tests.tiny_pipelines import PIPELINES, draw, inputs_of, make_pipeline


def count(module: torch.nn.Module) -> list[int]:
    """A list that grows by one with each call of `module`."""
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.fixture(scope="session")
def upstream_latents(upstream_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What upstream draws with each pipeline."""
    folder = tmp_path_factory.mktemp("upstream")
    zipfile.ZipFile(upstream_wheel).extractall(folder / "site")
    program = (
        "import diffusers, sys, torch\n"
        "from tests.tiny_pipelines import PIPELINES, draw, inputs_of, make_pipeline\n"
        "assert diffusers.__version__ == '0.42.1'\n"
        "torch.save({name: draw(make_pipeline(name), name) for name in PIPELINES}, sys.argv[1])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder / "site"), str(ROOT)])}
    command = [sys.executable, "-c", program, str(folder / "latents.pt")]
    subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=folder)
    return torch.load(folder / "latents.pt")


@pytest.mark.parametrize("name", PIPELINES)
def test_interval_one_is_bit_identical_to_upstream(name: str, upstream_latents: dict[str, torch.Tensor]) -> None:
    assert diffusers.__version__.startswith("0.42.1+npu.")
    assert torch.equal(draw(make_pipeline(name), name, cache_interval=1), upstream_latents[name])


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("branch", [(0, 0), (0, 1), (1, 0), (2, 2)], ids=str)
def test_the_pipeline_equals_the_deepcache_package(name: str, branch: tuple[int, int]) -> None:
    pipe = make_pipeline(name)
    block_id, layer_id = branch
    ours = draw(pipe, name, cache_interval=3, cache_block_id=block_id, cache_layer_id=layer_id)
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=3, cache_branch_id=3 * block_id + layer_id)
    helper.enable()
    theirs = draw(pipe, name)
    helper.disable()
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, draw(pipe, name))


@pytest.mark.parametrize("name", PIPELINES)
def test_one_step_in_each_interval_is_full(name: str) -> None:
    pipe = make_pipeline(name)
    middle = count(pipe.unet.mid_block)
    draw(pipe, name, cache_interval=3)
    steps = pipe.num_timesteps
    assert len(middle) == -(-steps // 3) < steps


@pytest.mark.parametrize("name", PIPELINES)
def test_a_prompt_is_projected_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = make_pipeline(name)
    keys = [module.to_k for path, module in pipe.unet.named_modules() if path.endswith("attn2")]
    calls: list[torch.nn.Module] = []
    forward = torch.nn.Linear.forward  # of the class: hooks may look at the prompt, which is handed on then
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: calls.append(self) or forward(self, x))
    draw(pipe, name)
    assert keys and [sum(call is layer for call in calls) for layer in keys] == [1] * len(keys)


@pytest.mark.parametrize("name", PIPELINES)
def test_what_a_callback_changes_is_seen(name: str) -> None:
    """Another prompt from the second step on: as if nothing had been kept from the first."""

    def other_prompt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": tensors["prompt_embeds"] * 0.5} if step == 1 else {}

    pipe = make_pipeline(name)
    middle = count(pipe.unet.mid_block)
    options = {"callback_on_step_end": other_prompt, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    cached = draw(pipe, name, cache_interval=3, **options)
    full_steps = len(middle)
    assert full_steps == -(-pipe.num_timesteps // 3) + 1
    pipe.unet.mid_block._forward_hooks.clear()
    assert not torch.equal(cached, draw(pipe, name, cache_interval=3))


def test_a_feature_is_not_reused_under_another_scale_of_the_controlnet() -> None:
    pipe = make_pipeline("ControlNet")
    middle = count(pipe.unet.mid_block)
    draw(pipe, "ControlNet", cache_interval=7, control_guidance_end=0.5)
    assert len(middle) == 2  # the first step, and the first without the ControlNet


def test_a_changed_controlnet_ends_the_reuse() -> None:
    def other_weights(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            with torch.no_grad():
                pipe.controlnet.controlnet_mid_block.weight.mul_(2)
        return {}

    pipe = make_pipeline("ControlNet")
    middle = count(pipe.unet.mid_block)
    draw(pipe, "ControlNet", cache_interval=7, callback_on_step_end=other_weights)
    assert len(middle) == 2


def test_several_controlnets_hand_their_pictures_to_callbacks() -> None:
    """Their pictures are a list."""
    pipe = make_pipeline("ControlNet")
    pipe.controlnet = MultiControlNetModel([pipe.controlnet, pipe.controlnet])
    inputs = {"image": [inputs_of("ControlNet")["image"]] * 2, "controlnet_conditioning_scale": [0.5, 0.5]}
    options = {"callback_on_step_end": lambda *_: {}, "callback_on_step_end_tensor_inputs": ["image"]}
    once = draw(make_pipeline("ControlNet"), "ControlNet")
    torch.testing.assert_close(draw(pipe, "ControlNet", **inputs, **options), once, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", PIPELINES)
def test_no_names_of_tensors_are_no_tensors(name: str) -> None:
    options = {"num_inference_steps": 2, "callback_on_step_end_tensor_inputs": None}
    plain = draw(make_pipeline(name), name, num_inference_steps=2)
    assert torch.equal(draw(make_pipeline(name), name, **options), plain)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_branch_that_the_unet_does_not_have_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no cache branch with cache_block_id=7"):
        draw(make_pipeline(name), name, cache_interval=2, cache_block_id=7)
