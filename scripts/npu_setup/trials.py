"""What a device computes: each operator that Stable Diffusion 2.1 depends on at its shapes, one graph and one
collective, against float32 on the CPU, with the time it takes."""

from __future__ import annotations

import functools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.npu_setup.checks import FAILURE, OK, ROOT, Result, first_line

if TYPE_CHECKING:
    import torch

    from ascend.device import DeviceManager

COMPUTES_NOT = "the device is there and cannot compute: check CANN's operators"
COMPUTES_WRONGLY = "the device computes wrongly: check that CANN, driver and firmware belong together"
UNITS = 8  # in the last place, of the largest result; sums are long, and each chip has an order of its own
REPETITIONS = 3
PATIENCE = 600  # seconds for ranks to meet; HCCL itself waits for two minutes

Tensors = tuple["torch.Tensor", ...]
Trial = tuple[Callable[..., "torch.Tensor"], Tensors]


def make_trials() -> dict[str, Trial]:
    """Functions and float32 inputs, as the UNet (with guidance), the text encoder and the decoder call them."""
    import torch
    import torch.nn.functional as F

    from processors import attention
    from processors.models.clip import exact_gelu
    from processors.models.resnet import group_norm_silu

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def norm_silu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        norm = torch.nn.GroupNorm(32, x.shape[1])
        norm.weight, norm.bias = torch.nn.Parameter(weight, False), torch.nn.Parameter(bias, False)
        return group_norm_silu(norm, x)

    tokens, prompt, text, decoder = (2, 4096, 320), (2, 77, 320), (2, 77, 1024), (1, 4096, 512)
    causal = functools.partial(attention, heads=16, is_causal=True)
    five_heads, one_head = (functools.partial(attention, heads=heads) for heads in (5, 1))
    return {
        "attention": (five_heads, (normal(*tokens), normal(*tokens), normal(*tokens))),
        "attention to a prompt": (five_heads, (normal(*tokens), normal(*prompt), normal(*prompt))),
        "causal attention": (causal, (normal(*text), normal(*text), normal(*text))),
        "attention in the decoder": (one_head, (normal(*decoder), normal(*decoder), normal(*decoder))),
        "group norm with SiLU": (norm_silu, (normal(2, 320, 64, 64), normal(320), normal(320))),
        "exact GELU": (exact_gelu, (normal(2, 77, 4096),)),
        "layer norm": (lambda x, w, b: F.layer_norm(x, (320,), w, b), (normal(*tokens), normal(320), normal(320))),
        "matrix product": (F.linear, (normal(*tokens), normal(2560, 320) / 320**0.5, normal(2560))),
        "convolution": (
            functools.partial(F.conv2d, padding=1),
            (normal(2, 320, 64, 64), normal(320, 320, 3, 3) / 2880**0.5, normal(320)),
        ),
    }


def run_trials(manager: DeviceManager) -> Iterator[Result]:
    """Each operator, then a graph and a collective where the device is an accelerator."""
    for name, (function, inputs) in make_trials().items():
        yield attempt(name, functools.partial(try_operator, manager, function, inputs))
    if manager.device.type == "npu":
        yield attempt("graph", functools.partial(try_graph, manager))
    if manager.device.type != "cpu":
        yield attempt("collective", functools.partial(try_collective, manager))


def attempt(name: str, trial: Callable[[], Result]) -> Result:
    try:
        result = trial()
    except Exception as error:  # whatever a broken installation raises
        return Result(name, FAILURE, first_line(error), COMPUTES_NOT, traceback.format_exc())
    result.name = name
    return result


def try_operator(manager: DeviceManager, function: Callable[..., torch.Tensor], inputs: Tensors) -> Result:
    import torch

    with torch.no_grad():
        there = [tensor.to(manager.device, manager.dtype) for tensor in inputs]
        function(*there)  # the first call loads the kernel
        seconds = []
        for _ in range(REPETITIONS):
            manager.synchronize()
            start = time.perf_counter()
            result = function(*there)
            manager.synchronize()
            seconds.append(time.perf_counter() - start)
        checked = compare(result, function(*inputs), statistics.median(seconds))
        why = explain_kernel(function, there)
        if why:
            checked.found, checked.details = f"{why.split()[0]} {checked.found}", why
        return checked


def explain_kernel(function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor]) -> str:
    """Which kernel computes an attention, and what ruled out the better ones; nothing for other functions."""
    from processors import attention
    from processors.kernels.call import AttentionInputs, describe
    from processors.kernels.select import explain

    if not isinstance(function, functools.partial) or function.func is not attention:
        return ""
    options = function.keywords
    query, key, value = inputs
    is_causal = options.get("is_causal", False)
    return explain(describe(AttentionInputs(query, key, value, options["heads"], None, is_causal, None)))


def compare(actual: torch.Tensor, expected: torch.Tensor, seconds: float) -> Result:
    import torch

    dtype = str(actual.dtype).removeprefix("torch.")
    difference = (actual.float().cpu() - expected).abs().max().item() / expected.abs().max().item()
    if not difference <= UNITS * torch.finfo(actual.dtype).eps:  # NaN is no agreement
        return Result(
            "", FAILURE, f"differs from the CPU by {difference:.2g} of the largest ({dtype})", COMPUTES_WRONGLY
        )
    found = f"agrees with the CPU within {difference:.1g} of the largest ({dtype}), {seconds * 1e3:.2f} ms"
    return Result("", OK, found)


def try_graph(manager: DeviceManager) -> Result:
    """A transformer block of the UNet's first level, compiled from nothing; the time is that of a call afterwards."""
    import torch
    from diffusers.models.attention import BasicTransformerBlock

    from ascend.graphs.compile import compile_module

    torch.manual_seed(0)
    block = BasicTransformerBlock(320, 5, 64, cross_attention_dim=1024).eval()
    tokens, prompt = torch.randn(2, 4096, 320), torch.randn(2, 77, 1024)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        expected = block(tokens, encoder_hidden_states=prompt)
        block.to(manager.device, manager.dtype)
        compile_module(block, graph_cache=Path(folder))
        return try_compiled(
            manager, lambda x, context: block(x, encoder_hidden_states=context), (tokens, prompt), expected
        )


def try_compiled(
    manager: DeviceManager, call: Callable[..., torch.Tensor], inputs: Tensors, expected: torch.Tensor
) -> Result:
    there = [tensor.to(manager.device, manager.dtype) for tensor in inputs]
    start = time.perf_counter()
    call(*there)
    manager.synchronize()
    compiled = time.perf_counter()
    result = call(*there)
    manager.synchronize()
    checked = compare(result, expected, time.perf_counter() - compiled)
    checked.found += f", {compiled - start:.0f} s to compile"
    return checked


def try_collective(manager: DeviceManager) -> Result:
    """all_gather between the first two devices, or of the only one with itself."""
    import torch

    ranks = min(2, torch.accelerator.device_count())
    devices = ",".join(map(str, range(ranks)))
    launcher = [sys.executable, ROOT / "examples/launch.py", "--device_list", devices]
    program = Path(__file__).with_name("gather.py")
    command = [str(part) for part in [*launcher, "--", program, manager.device.type]]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        said, errors = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return Result("", FAILURE, f"the ranks of {ranks} devices have not met in {PATIENCE} s", COMPUTES_NOT)
    if process.returncode:
        lines = errors.strip().splitlines() or [f"exit code {process.returncode}"]
        return Result("", FAILURE, lines[-1], "the devices cannot talk: check HCCL and the driver", errors)
    return Result("", OK, f"all_gather between {ranks} devices, {float(said.split()[-1]) * 1e3:.2f} ms")
