"""Graph compilation of a Stable Diffusion pipeline: torchair on NPU, inductor elsewhere."""

from __future__ import annotations

import functools
import shutil
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def compile_pipeline(pipe: StableDiffusionPipeline) -> dict[str, str]:
    """Compile text encoder, UNet and VAE decoder in place, each as static graphs without a break.

    The UNet becomes one graph per kind of call: with DeepCache a full and a shallow one. A new batch or picture size
    makes new graphs. The parameters must not be changed afterwards (LoRA: load and fuse first), as the graphs treat
    them as constants, in the layout that the matrix kernels read.

    Args:
        pipe: a pipeline whose components are where they are to run.

    Returns:
        The compiled components' names and the backend of each, `"torchair"` or `"inductor"`.

    Raises:
        RuntimeError: a component is offloaded, or a backend lacks what it needs, such as a C++ compiler.
    """
    all_components = {"text_encoder": pipe.text_encoder, "unet": pipe.unet, "vae.decoder": pipe.vae.decoder}
    components = {name: module for name, module in all_components.items() if module is not None}
    for name, module in components.items():
        if _is_offloaded(module):
            raise RuntimeError(
                f"{name} is offloaded, so its parameters move between calls and cannot be part of a graph: "
                "leave out either compilation or offloading"
            )
    return {name: compile_module(module) for name, module in components.items()}


def compile_module(module: nn.Module) -> str:
    """Compile one module in place (see `compile_pipeline`) and return the name of the backend.

    Raises:
        RuntimeError: the backend lacks what it needs.
    """
    device = next(module.parameters()).device
    module.requires_grad_(False)
    if device.type == "npu":
        module.compile(backend=_torchair_backend(module), fullgraph=True, dynamic=False)
        return "torchair"

    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        raise RuntimeError("compiling for the CPU needs a C++ compiler, and neither g++ nor clang++ is on the PATH")
    # Convolutions of both devices run in this layout; without it each is wrapped in two copies.
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    # Frozen weights are packed once into the layouts of the matrix kernels, instead of in every call.
    module.compile(backend="inductor", fullgraph=True, dynamic=False, options={"freezing": True})
    return "inductor"


def _is_offloaded(module: nn.Module) -> bool:
    return any(hasattr(child, "_hf_hook") or hasattr(child, "_diffusers_hook") for child in module.modules())


def _torchair_backend(module: nn.Module) -> Any:
    """torchair's GE backend with frozen parameters; also turns the module's weights into the chip's own layouts.

    Linear weights become FRACTAL_NZ, fp16 convolution weights FRACTAL_Z. 310P allows such formats from the start; the
    other chips only after `allow_internal_format`, which must be set before the weights are cast.
    """
    import torch_npu  # noqa: F401  registers the torchair alias
    import torchair
    from torchair.experimental.inference import use_internal_format_weight

    _register_converters()
    torch.get_device_module("npu").config.allow_internal_format = True
    use_internal_format_weight(module)
    config = torchair.CompilerConfig()
    config.experimental_config.frozen_parameter = True
    return torchair.get_npu_backend(compiler_config=config)


@functools.cache
def _register_converters() -> None:
    """Teach torchair the operator that torch_npu makes of `scaled_dot_product_attention` on other chips than 310P.

    It has a converter for the operator's first version only, which computes the same.
    """
    import torch_npu  # noqa: F401
    import torchair
    from torchair import ge

    @torchair.register_fx_node_ge_converter(torch.ops.npu.npu_fusion_attention_v3.default)
    def convert_attention(
        query: Any,
        key: Any,
        value: Any,
        head_num: int,
        input_layout: str,
        pse: Any = None,
        padding_mask: Any = None,
        atten_mask: Any = None,
        scale: float = 1.0,
        keep_prob: float = 1.0,
        pre_tockens: int = 2147483647,
        next_tockens: int = 2147483647,
        inner_precise: int = 0,
        prefix: Any = None,
        actual_seq_qlen: Any = None,
        actual_seq_kvlen: Any = None,
        sparse_mode: int = 0,
        gen_mask_parallel: bool = True,
        sync: bool = False,
        softmax_layout: str = "",
        sink: Any = None,
        meta_outputs: Any = None,
    ) -> tuple[Any, ...]:
        unsupported = (padding_mask, prefix, actual_seq_qlen, actual_seq_kvlen, sink)
        if keep_prob != 1 or softmax_layout or any(argument is not None for argument in unsupported):
            raise RuntimeError("attention with dropout, sinks or packed sequences is not compiled to graphs")
        inputs = {"query": query, "key": key, "value": value, "real_shift": pse, "drop_mask": None}
        inputs |= {"padding_mask": None, "atten_mask": atten_mask}
        attributes = {
            "scale_value": ge.attr.Float(scale),
            "keep_prob": ge.attr.Float(1.0),
            "pre_tockens": ge.attr.Int(pre_tockens),
            "next_tockens": ge.attr.Int(next_tockens),
            "head_num": ge.attr.Int(head_num),
            "input_layout": ge.attr.Str(input_layout),
            "inner_precise": ge.attr.Int(inner_precise),
            "sparse_mode": ge.attr.Int(sparse_mode),
        }
        outputs = ["softmax_max", "softmax_sum", "softmax_out", "attention_out"]
        maximum, total, out, attended = ge.custom_op(
            "FlashAttentionScore", inputs=inputs, outputs=outputs, attrs=attributes
        )
        no_dropout = ge.Const(0, dtype=ge.DataType.DT_INT64)
        return attended, maximum, total, out, no_dropout, no_dropout
