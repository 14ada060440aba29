"""Mixed precision: the dtypes of autocast, and gradients that overflow: the step is skipped, the scale halves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch_npu
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tests.on_npu.helpers import FLOATS, SATURATES
from tests.on_npu.inputs import numbers

HALVES = FLOATS[1:]
Scaler = Callable[..., torch.amp.GradScaler]
SCALERS: dict[str, Scaler] = {"torch_npu": torch.npu.amp.GradScaler, "torch": partial(torch.amp.GradScaler, "npu")}


class Model(torch.nn.Module):
    """Two products and a sum: the backward pass needs no other operators."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (torch.nn.Parameter(numbers((8, 8), torch.float32, seed) / 8) for seed in (0, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.first @ self.second


def loss_of(model: Model, x: torch.Tensor) -> torch.Tensor:
    return model(x).float().square().mean()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    x, y = numbers((3, 4), torch.float32).to("npu"), numbers((4, 5), torch.float32, 1).to("npu")
    weight = torch.nn.Linear(4, 2, device="npu")
    with torch.autocast("npu", dtype=dtype):
        assert torch.is_autocast_enabled("npu") and torch.get_autocast_dtype("npu") == dtype
        assert (x @ y).dtype == weight(x).dtype == torch.bmm(x[None], y[None]).dtype == dtype
        assert x.softmax(-1).dtype == torch.layer_norm((x @ y), (5,)).dtype == (x @ y).exp().dtype == torch.float32
        assert (x + x).dtype == torch.float32 and (x @ y).add(x @ y).dtype == dtype
        with torch.autocast("npu", enabled=False):
            assert (x @ y).dtype == torch.float32
    torch.testing.assert_close((x.to(dtype) @ y.to(dtype)).float().cpu(), x.cpu() @ y.cpu(), rtol=0.05, atol=0.05)
    assert (x @ y).dtype == torch.float32


@pytest.mark.skipif(not SATURATES, reason="of 310P")
def test_autocast_to_what_the_chip_does_not_have() -> None:
    with pytest.warns(UserWarning, match="not supported"), torch.autocast("npu", dtype=torch.bfloat16):
        assert not torch.is_autocast_enabled("npu")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients_of_autocast(dtype: torch.dtype) -> None:
    model, x = Model(), numbers((4, 8), torch.float32, 2)
    twin = copy.deepcopy(model).to("npu")
    loss_of(model, x).backward()
    with torch.autocast("npu", dtype=dtype):
        loss = loss_of(twin, x.to("npu"))
    loss.backward()
    for one, other in zip(twin.parameters(), model.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and one.grad.dtype == torch.float32
        torch.testing.assert_close(one.grad.cpu(), other.grad, rtol=0.05, atol=0.02 * other.grad.abs().max().item())


def steps_of(scaler: torch.amp.GradScaler) -> list[tuple[bool, float]]:
    """Whether each step changed the weights, and the scale after it; the second overflows in float16."""
    model, x = Model().to("npu"), numbers((4, 8), torch.float32, 2).to("npu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    steps = []
    for scale_of_data in (1, 1e4, 1, 1):
        optimizer.zero_grad()
        before = model.first.detach().clone()
        with torch.autocast("npu", dtype=torch.float16):
            loss = model(x).float().mul(scale_of_data).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        steps.append((not torch.equal(model.first, before), scaler.get_scale()))
    return steps


@pytest.mark.parametrize("name", SCALERS)
def test_a_step_that_overflows_is_skipped(name: str) -> None:
    scaler = SCALERS[name](init_scale=2.0**10, growth_interval=2)
    if SATURATES and name == "torch":
        with pytest.raises(RuntimeError, match="AmpUpdateScale on Ascend310P3: the operator has no kernel"):
            steps_of(scaler)
        return
    assert steps_of(scaler) == [(True, 2.0**10), (False, 2.0**9), (True, 2.0**9), (True, 2.0**10)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.skipif(SATURATES, reason="310P looks at its overflow flag")
def test_unscaling_finds_what_is_not_finite(dtype: torch.dtype) -> None:
    several = [numbers((4, 5), dtype, seed).to("npu") for seed in range(260)]  # more than one launch takes
    before = [gradient.clone() for gradient in several]
    found, inverse = torch.zeros(1, device="npu"), torch.full((1,), 0.5, device="npu")
    torch._amp_foreach_non_finite_check_and_unscale_(several, found, inverse)
    assert found.item() == 0
    for gradient, old in zip(several, before, strict=True):
        torch.testing.assert_close(gradient, old * 0.5)
    for value in (float("inf"), float("nan")):
        several[255][1, 2] = value
        torch._amp_foreach_non_finite_check_and_unscale_(several, found.zero_(), inverse)
        assert found.item() == 1


@pytest.mark.skipif(SATURATES, reason="310P does without the operator")
def test_the_scale_grows_and_falls() -> None:
    scale, tracker = torch.full((1,), 8.0, device="npu"), torch.zeros(1, dtype=torch.int32, device="npu")
    seen = []
    for found in (0, 0, 1, 0, 0, 0, 0):
        torch._amp_update_scale_(scale, tracker, torch.full((1,), float(found), device="npu"), 2.0, 0.5, 3)
        seen.append((scale.item(), tracker.item()))
    assert seen == [(8, 1), (8, 2), (4, 0), (4, 1), (4, 2), (8, 0), (8, 1)]
    largest = torch.full((1,), 3e38, device="npu")
    torch._amp_update_scale_(largest, tracker.fill_(2), torch.zeros(1, device="npu"), 2.0, 0.5, 3)
    assert largest.item() == pytest.approx(3e38) and tracker.item() == 0


@pytest.mark.skipif(not SATURATES, reason="910B3 has infinity, and no flag by default")
def test_the_flag_of_a_saturating_chip() -> None:
    flag = torch_npu.npu_alloc_float_status(torch.zeros(8, device="npu"))
    torch_npu.npu_clear_float_status(flag)
    large = torch.full((3,), 6e4, dtype=torch.float16, device="npu")
    assert (large + large).tolist() == [65504.0] * 3
    assert torch_npu.npu_get_float_status(flag)[0].item() == 1
    torch_npu.npu_clear_float_status(flag)
    assert torch_npu.npu_get_float_status(torch.zeros(8, device="npu"))[0].item() == 0


def test_a_scaler_goes_on_from_its_state() -> None:
    first, second = (torch.npu.amp.GradScaler(init_scale=scale, growth_interval=7) for scale in (8.0, 2.0))
    first.scale(torch.ones(1, device="npu"))
    second.load_state_dict(first.state_dict())
    assert second.scale(torch.ones(1, device="npu")).item() == 8


@pytest.mark.parametrize("precision", ("no", "fp16", "bf16"))
def test_accelerate(precision: str) -> None:
    """As diffusers' trainers use it: two micro-batches a step, clipped, against float32 on the CPU."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = Accelerator(mixed_precision=precision, gradient_accumulation_steps=2)
        assert accelerator.device.type == "npu"
        model, twin = Model(), Model()
        optimizer, steps = (torch.optim.SGD(several.parameters(), lr=0.1) for several in (model, twin))
        model, optimizer = accelerator.prepare(model, optimizer)
        for micro_batch in range(4):
            x = numbers((4, 8), torch.float32, 10 + micro_batch)
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, x.to("npu")))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
            (loss_of(twin, x) / 2).backward()
            if micro_batch % 2:
                torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
                steps.step()
                steps.zero_grad()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    exact = precision == "no" and not SATURATES
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.detach().cpu(), other.detach(), rtol=0, atol=1e-6 if exact else 1e-3)
