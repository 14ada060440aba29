"""What each of two ranks does in the tests of shared pipelines: `python pipeline_ranks.py DEVICE_TYPE --output FILE`.

All pipelines draw, with DeepCache and fused kernels, alone and shared. Rank 0 writes to FILE how far apart they are.
"""

import argparse
import json
import os
from pathlib import Path

import torch

from ascend import DeviceManager, process_group, share_guidance, unshare_guidance
from processors import enable_fused_kernels
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
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("device_type")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    result = differences(args.device_type)
    if os.environ["RANK"] == "0":
        args.output.write_text(json.dumps(result))
