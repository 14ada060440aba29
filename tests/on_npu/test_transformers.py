"""Transformers that attend through diffusers' dispatcher, by the chip's fused kernel, against the CPU in float32."""

from __future__ import annotations

import pytest
import torch
from diffusers import ModelMixin

from processors import AttentionCall, enable_fused_kernels
from processors.kernels.select import Kernel, select_kernel
from tests.on_npu.helpers import SATURATES
from tests.tiny_transformers import TRANSFORMERS, call, make_transformer

HALF = torch.float16 if SATURATES else torch.bfloat16
FUSED = "npu_prompt_flash_attention" if SATURATES else "npu_fused_infer_attention_score"
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}[HALF]  # of the prediction's norm; two layers, rounded each


@torch.no_grad()
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_a_transformer_attends_by_the_chips_fused_kernel(
    npu: torch.device, kind: type[ModelMixin], monkeypatch: pytest.MonkeyPatch
) -> None:
    names: set[str] = set()

    def record(described: AttentionCall) -> Kernel:
        names.add(select_kernel(described).name)
        return select_kernel(described)

    model = make_transformer(kind).to(HALF).float()  # the weights that the chip gets
    expected = call(model)
    monkeypatch.setattr("processors.kernels.attention.select_kernel", record)
    model.to(npu, HALF)
    enable_fused_kernels(model)
    actual = call(model).cpu().float()
    assert names == {FUSED}
    assert (actual - expected).norm() < TOLERANCE * expected.norm()
