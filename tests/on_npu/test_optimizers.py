"""Optimisers of torch and torch_npu, clipping and averages of weights, against float32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch_npu
from diffusers.training_utils import EMAModel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.on_npu.helpers import FLOATS, SATURATES
from tests.on_npu.inputs import numbers

SHAPES = ((4, 6), (9,), (2, 3, 5))
STEPS = 5
# Of a weight of size 1 after five steps of 0.1: what rounding in another order makes of it, 16 bits in each step.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}

Optimizer = Callable[..., torch.optim.Optimizer]
OPTIMIZERS: dict[str, tuple[Optimizer, dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
    "AdamW amsgrad": (torch.optim.AdamW, {"lr": 0.1, "amsgrad": True}),
    "AdamW maximize": (torch.optim.AdamW, {"lr": 0.1, "maximize": True}),
    "Adam": (torch.optim.Adam, {"lr": 0.1}),
    "Adam decay": (torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True}),
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "SGD momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    "SGD nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.9, "centered": True}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
    "Adadelta": (torch.optim.Adadelta, {"lr": 0.1}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.1}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.1}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.1}),
}
FUSED = ("AdamW", "AdamW amsgrad", "AdamW maximize", "Adam", "Adam decay", "SGD momentum", "SGD nesterov")


def parameters(dtype: torch.dtype, device: str) -> list[torch.nn.Parameter]:
    return [
        torch.nn.Parameter(numbers(shape, dtype, seed).to(torch.float32 if device == "cpu" else dtype).to(device))
        for seed, shape in enumerate(SHAPES)
    ]


def set_gradients(weights: Iterable[torch.nn.Parameter], dtype: torch.dtype, step: int) -> None:
    """In place of a backward pass, of which this tests nothing."""
    for index, weight in enumerate(weights):
        gradient = numbers(weight.shape, dtype, seed=100 * step + index).to(weight.dtype).to(weight.device)
        if weight.grad is None:
            weight.grad = gradient
        else:
            weight.grad.copy_(gradient)


def train(make: Optimizer, options: dict[str, Any], dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    weights = parameters(dtype, device)
    optimizer = make(weights, **options)
    for step in range(STEPS):
        set_gradients(weights, dtype, step)
        optimizer.step()
    return [weight.detach().cpu() for weight in weights]


def assert_near(actual: Iterable[torch.Tensor], expected: Iterable[torch.Tensor], dtype: torch.dtype) -> None:
    tolerance = TOLERANCES[dtype]
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.float().cpu(), other.float(), rtol=tolerance, atol=tolerance)


CASES = [*((name, torch.float32) for name in OPTIMIZERS)]
CASES += [(name, dtype) for name in ("AdamW", "SGD momentum") for dtype in FLOATS[1:]]


@pytest.mark.parametrize("foreach", (False, True), ids=("each", "lists"))
@pytest.mark.parametrize("name, dtype", CASES, ids=str)
def test_optimizers(name: str, dtype: torch.dtype, foreach: bool) -> None:
    make, options = OPTIMIZERS[name]
    expected = train(make, {**options, "foreach": False}, dtype, "cpu")
    assert_near(train(make, {**options, "foreach": foreach}, dtype, "npu"), expected, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_fused_optimizers(name: str, dtype: torch.dtype) -> None:
    make, options = OPTIMIZERS[name]
    if SATURATES and not name.startswith("Adam ") and name != "Adam":
        with pytest.raises(RuntimeError, match="the operator has no kernel for this chip"):
            train(make, {**options, "fused": True}, dtype, "npu")
        return
    expected = train(make, {**options, "foreach": False}, dtype, "cpu")
    assert_near(train(make, {**options, "fused": True}, dtype, "npu"), expected, dtype)


def test_steps_that_are_counted_on_the_chip() -> None:
    make, options = OPTIMIZERS["AdamW"]
    expected = train(make, options, torch.float32, "cpu")
    for foreach in (False, True):
        actual = train(make, {**options, "foreach": foreach, "capturable": True}, torch.float32, "npu")
        assert_near(actual, expected, torch.float32)


def test_a_fused_optimizer_goes_on_from_its_state() -> None:
    make, options = OPTIMIZERS["AdamW" if not SATURATES else "Adam"]
    weights = parameters(torch.float32, "npu")
    first, second = (make(weights, **options, fused=True) for _ in range(2))
    for step in range(STEPS):
        set_gradients(weights, torch.float32, step)
        if step == 2:
            second.load_state_dict(first.state_dict())
        (first if step < 2 else second).step()
    assert_near(weights, train(make, {**options, "foreach": False}, torch.float32, "cpu"), torch.float32)


def test_fused_sgd_divides_by_the_scale_and_skips_what_is_not_finite() -> None:
    weights = [numbers((4, 6), torch.float32).to("npu")]
    gradients, buffers = [numbers((4, 6), torch.float32, 1).to("npu")], [torch.zeros(4, 6, device="npu")]
    before, gradient = weights[0].cpu(), gradients[0].cpu()
    numbers_of = {"weight_decay": 0.0, "momentum": 0.5, "lr": 0.1, "dampening": 0.0, "nesterov": False}
    flags = {"maximize": False, "is_first_step": True, "grad_scale": torch.tensor([4.0], device="npu")}
    if SATURATES:
        with pytest.raises(RuntimeError, match="the operator has no kernel for this chip"):
            torch._fused_sgd_(weights, gradients, buffers, **numbers_of, **flags)
        return
    found = torch.ones(1, device="npu")
    torch._fused_sgd_(weights, gradients, buffers, **numbers_of, **flags, found_inf=found)
    assert torch.equal(weights[0].cpu(), before)
    torch._fused_sgd_(weights, gradients, buffers, **numbers_of, **flags, found_inf=found * 0)
    torch.testing.assert_close(gradients[0].cpu(), gradient / 4)
    torch.testing.assert_close(buffers[0].cpu(), gradient / 4)
    torch.testing.assert_close(weights[0].cpu(), before - 0.1 * gradient / 4)


VENDORS: dict[str, tuple[Optimizer, Optimizer, dict[str, Any]]] = {
    "Adam": (torch_npu.optim.NpuFusedAdam, torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.1}),
    "AdamW": (torch_npu.optim.NpuFusedAdamW, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True}),
    "SGD": (torch_npu.optim.NpuFusedSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "Adadelta": (torch_npu.optim.NpuFusedAdadelta, torch.optim.Adadelta, {"lr": 0.1}),
    "RMSprop": (torch_npu.optim.NpuFusedRMSprop, torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.9}),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("name", VENDORS)
def test_optimizers_of_torch_npu(name: str, dtype: torch.dtype) -> None:
    """They keep all weights of a dtype in one tensor, into which the weights become views."""
    vendors, torchs, options = VENDORS[name]
    assert_near(train(vendors, options, dtype, "npu"), train(torchs, options, dtype, "cpu"), dtype)


def test_an_optimizer_of_torch_npu_clips_all_at_once() -> None:
    weights, twins = parameters(torch.float32, "npu"), parameters(torch.float32, "cpu")
    for several in (weights, twins):
        set_gradients(several, torch.float32, 0)
    norm = torch_npu.optim.NpuFusedAdamW(weights).clip_grad_norm_fused_(1.0)
    expected = torch.nn.utils.clip_grad_norm_(twins, 1.0)
    torch.testing.assert_close(norm.cpu(), expected)
    assert_near([w.grad for w in weights], [w.grad for w in twins], torch.float32)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("foreach", (False, True), ids=("each", "lists"))
@pytest.mark.parametrize("order", (2.0, 1.0, torch.inf))
def test_clipping(order: float, foreach: bool, dtype: torch.dtype) -> None:
    weights, twins = parameters(dtype, "npu"), parameters(dtype, "cpu")
    for several in (weights, twins):
        set_gradients(several, dtype, 0)
    norm = torch.nn.utils.clip_grad_norm_(weights, 0.5, order, foreach=foreach)
    expected = torch.nn.utils.clip_grad_norm_(twins, 0.5, order, foreach=False)
    torch.testing.assert_close(norm.float().cpu(), expected, rtol=TOLERANCES[dtype], atol=0)
    assert_near([w.grad for w in weights], [w.grad for w in twins], dtype)
    torch.nn.utils.clip_grad_value_(weights, 0.01, foreach=foreach)
    assert all(w.grad.abs().max() <= 0.011 for w in weights)


def test_averages_of_weights() -> None:
    averages = []
    for device in ("npu", "cpu"):
        model = torch.nn.ParameterList(parameters(torch.float32, device))
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        for step in range(3):
            average.update_parameters(model)
            with torch.no_grad():
                torch._foreach_mul_(list(model), 1.0 + step)
        averages.append([weight.detach() for weight in average.module])
    assert_near(*averages, torch.float32)


@pytest.mark.parametrize("foreach", (False, True), ids=("each", "lists"))
def test_averages_of_diffusers(foreach: bool) -> None:
    averages = []
    for device in ("npu", "cpu"):
        weights = parameters(torch.float32, device)
        average = EMAModel(weights, decay=0.9, foreach=foreach)
        for step in range(3):
            with torch.no_grad():
                torch._foreach_mul_(weights, 1.0 + step)
            average.step(weights)
        average.store(weights)
        average.copy_to(weights)
        averages.append([weight.detach().clone() for weight in weights])
        average.restore(weights)
        averages.append([weight.detach() for weight in weights])
    assert_near(averages[0], averages[2], torch.float32)
    assert_near(averages[1], averages[3], torch.float32)


SCALARS = {"lr": 0.05, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-4}


def states(dtype: torch.dtype, *names: str) -> dict[str, torch.Tensor]:
    return {name: numbers((5, 7), dtype, seed, low=0.1) for seed, name in enumerate(names)}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("maximize", (False, True))
def test_npu_apply_adam_w(maximize: bool, dtype: torch.dtype) -> None:
    x = states(dtype, "var", "m", "v", "grad")
    var, m, v, grad = (x[name].to("npu") for name in x)
    powers = {"beta1_power": 0.9**2, "beta2_power": 0.99**2}
    torch_npu.npu_apply_adam_w(
        **powers,
        **SCALARS,
        weight_decay=0.1,
        grad=grad,
        max_grad_norm=None,
        amsgrad=False,
        maximize=maximize,
        out=(var, m, v),
    )
    twin = torch.nn.Parameter(x["var"].float())
    twin.grad = x["grad"].float()
    options = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.1, "maximize": maximize}
    optimizer = torch.optim.AdamW([twin], **options)
    optimizer.state[twin] = {"step": torch.tensor(2.0), "exp_avg": x["m"].float(), "exp_avg_sq": x["v"].float()}
    optimizer.step()
    state = optimizer.state[twin]
    assert_near([var, m, v], [twin.detach(), state["exp_avg"], state["exp_avg_sq"]], dtype)


@pytest.mark.parametrize("nesterov", (False, True))
def test_npu_apply_adam(nesterov: bool) -> None:
    x = states(torch.float32, "var", "m", "v", "grad")
    var, m, v, grad = (x[name].to("npu") for name in x)
    torch_npu.npu_apply_adam(
        0.81, 0.98, **SCALARS, grad=grad, use_locking=False, use_nesterov=nesterov, out=(var, m, v)
    )
    mean = 0.9 * x["m"] + 0.1 * x["grad"]
    square = 0.99 * x["v"] + 0.01 * x["grad"] ** 2
    direction = 0.9 * mean + 0.1 * x["grad"] if nesterov else mean
    rate = 0.05 * (1 - 0.98) ** 0.5 / (1 - 0.81)
    assert_near([var, m, v], [x["var"] - rate * direction / (square.sqrt() + 1e-4), mean, square], torch.float32)


@pytest.mark.parametrize("mode", (0, 1), ids=("BERT", "mBART"))
def test_npu_bert_apply_adam(mode: int) -> None:
    x = states(torch.float32, "var", "m", "v", "grad")
    var, m, v, grad = (x[name].to("npu") for name in x)
    step = {"step_size": 0.02} if mode else {}
    torch_npu.npu_bert_apply_adam(
        **SCALARS,
        grad=grad,
        max_grad_norm=-1,
        global_grad_norm=0,
        weight_decay=0.1,
        **step,
        adam_mode=mode,
        out=(var, m, v),
    )
    mean = 0.9 * x["m"] + 0.1 * x["grad"]
    square = 0.99 * x["v"] + 0.01 * x["grad"] ** 2
    change = mean / (square.sqrt() + 1e-4) * (0.02 if mode else 0.05)
    assert_near([var, m, v], [x["var"] - change - 0.05 * 0.1 * x["var"], mean, square], torch.float32)
