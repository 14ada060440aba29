"""What a preset switches on in a training: the table, and the switches of a denoiser that trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel

from processors.presets.table import Outcome, Report
from processors.switches import enable_fused_kernels

TRAINING_SWITCHES = (
    "fused_kernels",
    "mixed_precision",
    "cached_inputs",
    "ema",
    "gradient_checkpointing",
    "activation_offload",
)
_ALWAYS = {"fused_kernels", "mixed_precision", "cached_inputs"}
TRAINING_PRESETS: dict[str, frozenset[str]] = {
    "speed": frozenset(_ALWAYS),
    # The average of the weights draws better than the last ones, and costs their memory once more.
    "balanced": frozenset(_ALWAYS | {"ema"}),
    # The least memory of the device, for a quarter to a third more time.
    "memory": frozenset(_ALWAYS | {"gradient_checkpointing", "activation_offload"}),
    "full": frozenset(TRAINING_SWITCHES),
}


def prepare_for_training(
    unet: UNet2DConditionModel, switches: dict[str, bool], device: torch.device, dtype: torch.dtype
) -> Report:
    """Switch on in `unet` what `switches` asks for, as far as it can be on `device`.

    Mixed precision, cached inputs and the average of weights are the training loop's to do, and reported here; so is
    `offloaded_activations`, which has to be around each forward pass.

    Args:
        switches: of each of `TRAINING_SWITCHES` whether it is wanted.
        dtype: that of the products; float32 for no mixed precision.

    Returns:
        Of each switch "applied" and what shows it, "unsupported" and why, or "not asked for".
    """
    report = Report({name: Outcome("not asked for") for name in TRAINING_SWITCHES})
    if switches["fused_kernels"]:
        report["fused_kernels"] = Outcome("applied", "; ".join(enable_fused_kernels(unet).values()))
    if switches["mixed_precision"]:
        report["mixed_precision"] = (
            Outcome("unsupported", f"products are float32 on {device}")
            if dtype == torch.float32
            else Outcome("applied", f"{str(dtype).removeprefix('torch.')} under autocast, trained weights in float32")
        )
    if switches["cached_inputs"]:
        report["cached_inputs"] = Outcome("applied", "latents and text embeddings are read from disk")
    if switches["ema"]:
        report["ema"] = Outcome("applied", "an average of the trained weights is kept")
    if switches["gradient_checkpointing"]:
        unet.enable_gradient_checkpointing()
        report["gradient_checkpointing"] = Outcome("applied", "blocks are computed again in the backward pass")
    if switches["activation_offload"]:
        report["activation_offload"] = (
            Outcome("unsupported", "the CPU computes in host memory, where activations are anyway")
            if device.type == "cpu"
            else Outcome("applied", "what the backward pass needs waits in host memory")
        )
    return report


@contextmanager
def offloaded_activations(report: Report) -> Iterator[None]:
    """Around a forward pass: what its backward pass needs goes to host memory, where the report says so."""
    if report["activation_offload"].status == "applied":
        with torch.autograd.graph.save_on_cpu(pin_memory=True):
            yield
    else:
        yield
