"""Graph compilation of a Stable Diffusion pipeline: torchair on NPU, inductor elsewhere."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._functorch.compile_utils import fx_graph_cse

from ascend.converters import register_converters
from ascend.static_graphs import StaticGraphs

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def compile_pipeline(pipe: StableDiffusionPipeline, graph_cache: Path | None = None) -> dict[str, str]:
    """Compile text encoder, UNet and VAE decoder in place, each as static graphs without a break.

    The UNet becomes one graph per kind of call: with DeepCache a full and a shallow one. A new batch or picture size
    makes new graphs, and those of earlier ones stay. Whatever changes the computation (attention processors, token
    merging, LoRA: load and fuse first) must be installed before, as the graphs treat the parameters as constants, in
    the layout that the matrix kernels read.

    Args:
        pipe: a pipeline whose components are where they are to run.
        graph_cache: where an NPU's graphs are kept for the next process; by default in the user's cache directory.

    Returns:
        The components' names and how each runs: `"torchair"`, `"inductor"`, or `"eager"` where it is offloaded or on
        another device than the UNet, so that its parameters are no constants of a graph.

    Raises:
        RuntimeError: a backend lacks what it needs, such as a C++ compiler.
    """
    components = {"text_encoder": pipe.text_encoder, "unet": pipe.unet, "vae.decoder": pipe.vae.decoder}
    device = next(pipe.unet.parameters()).device
    return {
        name: "eager" if _moves(module, device) else compile_module(module, graph_cache)
        for name, module in components.items()
        if module is not None
    }


def compile_module(module: nn.Module, graph_cache: Path | None = None) -> str:
    """Compile one module in place (see `compile_pipeline`) and return the name of the backend.

    Raises:
        RuntimeError: the backend lacks what it needs.
    """
    device = next(module.parameters()).device
    module.requires_grad_(False)
    # In both cases an instance's attribute hides the class's method: the module, its hooks and its name stay.
    if device.type == "npu":
        use_private_formats(module)
        module.forward = StaticGraphs(module, torchair_config(), graph_cache or default_graph_cache())
        return "torchair"

    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        raise RuntimeError("compiling for the CPU needs a C++ compiler, and neither g++ nor clang++ is on the PATH")
    # Convolutions of both devices run in this layout; without it each is wrapped in two copies.
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    # Frozen weights are packed once into the layouts of the matrix kernels, instead of in every call.
    options: dict[str, Any] = {"freezing": True}
    module.forward = torch.compile(module.forward, backend="inductor", fullgraph=True, dynamic=False, options=options)
    return "inductor"


def default_graph_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "diffusers-npu" / "graphs"


def _moves(module: nn.Module, device: torch.device) -> bool:
    if any(hasattr(child, "_hf_hook") or hasattr(child, "_diffusers_hook") for child in module.modules()):
        return True
    return next(module.parameters()).device != device


def torchair_config() -> Any:
    """torchair's compiler configuration for inference, with torchair ready to compile what this project makes."""
    import torch_npu  # noqa: F401  registers the torchair alias
    import torchair
    import torchair._contrib.custom_torch_ops  # declares the fused token merging

    register_converters()
    config = torchair.CompilerConfig()
    config.experimental_config.frozen_parameter = True
    config.post_grad_custom_pre_pass = _compute_once
    # This is what changes torch's own decompositions; cache_compile does so only after the first graph was traced.
    torchair.get_npu_backend(compiler_config=config)
    return config


def _compute_once(module: torch.fx.GraphModule, *_: Any) -> None:
    """Compute what several nodes have in common once, such as the SiLU of the time embedding in each residual block.

    Inductor does so by itself, torchair does not.
    """
    module.graph = fx_graph_cse(module.graph)


def use_private_formats(module: nn.Module) -> None:
    """Turn the module's weights into the chip's own layouts: FRACTAL_NZ of Linear, FRACTAL_Z of fp16 convolutions.

    310P allows such formats from the start; the other chips only after `allow_internal_format`, which must be set
    before the weights are cast. It is off again afterwards, as `ascend.device` has it: eager convolutions would else
    go through the old operator interface.
    """
    from torchair.experimental.inference import use_internal_format_weight

    config = torch.get_device_module("npu").config
    config.allow_internal_format = True
    use_internal_format_weight(module)
    config.allow_internal_format = False
