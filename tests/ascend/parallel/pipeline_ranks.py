"""What each of two ranks does in the tests of shared pipelines: `python pipeline_ranks.py DEVICE_TYPE --output FILE`.

All pipelines draw, with DeepCache and fused kernels, alone and shared. Rank 0 writes to FILE how far apart they are.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from diffusers import HiDreamImageEditingPipeline
from PIL import Image

from ascend import (
    DeviceManager,
    Mesh,
    process_group,
    share_guidance,
    share_model,
    unshare_guidance,
    unshare_model,
)
from processors import enable_fused_kernels
from tests.tiny_hidream import make_components, make_transformer
from tests.tiny_pipelines import PIPELINES, draw, make_pipeline


def differences(device_type: str) -> dict[str, float]:
    """For each pipeline the greatest difference between latents, of their standard deviation."""
    manager = DeviceManager(device_type if device_type == "cpu" else f"{device_type}:{os.environ['LOCAL_RANK']}")
    found = {}
    with process_group(manager.device, branch_size=2) as mesh:
        for name in PIPELINES:
            pipe = make_pipeline(name).to(manager.device, manager.dtype, silence_dtype_warnings=True)
            enable_fused_kernels(pipe)
            alone = draw(pipe, name, cache_interval=2).float().cpu()
            share_guidance(pipe, mesh)
            shared = draw(pipe, name, cache_interval=2).float().cpu()
            unshare_guidance(pipe)
            assert torch.equal(draw(pipe, name, cache_interval=2).float().cpu(), alone)
            found[name] = ((shared - alone).abs().max() / alone.std()).item()
        found["HiDream editing"] = difference_of_edits(manager, mesh)
    return found


def difference_of_edits(manager: DeviceManager, mesh: Mesh) -> float:
    """Three branches on two ranks, and two where a second transformer refines."""
    pipe = HiDreamImageEditingPipeline(**make_components())
    refiner = make_transformer(seed=7)
    for model in (pipe, refiner):
        model.to(manager.device, manager.dtype)
        enable_fused_kernels(model)
    alone = edit(pipe, refiner)
    share_guidance(pipe, mesh)
    share_model(refiner, mesh)
    shared = edit(pipe, refiner)
    unshare_guidance(pipe)
    unshare_model(refiner)
    assert torch.equal(edit(pipe, refiner), alone)
    return ((shared - alone).abs().max() / alone.std()).item()


def edit(pipe: HiDreamImageEditingPipeline, refiner: torch.nn.Module) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "refine_strength": 0.5, "max_sequence_length": 16, "output_type": "latent"}
    image = Image.new("RGB", (48, 80), "red")
    generator = torch.Generator().manual_seed(0)
    return pipe("make it blue", image=image, refiner=refiner, generator=generator, **options).images.float().cpu()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("device_type")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    result = differences(args.device_type)
    if os.environ["RANK"] == "0":
        args.output.write_text(json.dumps(result))
