"""Switch a preset on and off."""

import os
from contextlib import ExitStack
from weakref import WeakKeyDictionary, WeakSet

import torch

from ascend.device import default_device
from processors.models.components import components_of
from processors.presets.switches import APPLY
from processors.presets.table import DEFAULT, PRESETS, SWITCHES, VARIABLE, Outcome, Report, check_preset
from processors.presets.target import Target, Undo, Unsupported

# What takes back a target's preset, in the order in which it was applied; none of it holds the target.
_undo: WeakKeyDictionary[Target, list[Undo]] = WeakKeyDictionary()
# The models that a target had then.
_models: WeakKeyDictionary[Target, "WeakSet[torch.nn.Module]"] = WeakKeyDictionary()


def enable(target: Target, preset: str | None = None, device: torch.device | None = None) -> Report:
    """Switch on what `preset` asks for, as far as it can be on `target` where that computes.

    What is on already stays as it is, and stays on when the preset is taken back. A preset that `enable` switched on
    before is taken back first.

    Args:
        target: a pipeline of diffusers, or a model.
        preset: "speed", "balanced", "memory" or "full". None takes the environment's `ASCEND_PRESET`, read in this
            call, else "balanced".
        device: on which `target` computes, if a preset that streams is to bring it there. None: where it is; from host
            memory such a preset brings it to the best device there is.

    Returns:
        Of each switch "applied" and what shows it, "unsupported" and why, or "not asked for".

    Raises:
        ValueError: no such preset, or a model of `target` is under the preset of another target. Nothing has changed.
        TypeError: `target` is neither a pipeline nor a model.
        RuntimeError: a switch failed, or an earlier preset cannot be taken back. What this call has done is undone.
    """
    if preset is None:
        preset = check_preset(os.environ.get(VARIABLE) or DEFAULT, VARIABLE)
    asked = PRESETS[check_preset(preset)]
    _require_no_other(target)
    disable(target)
    place = device or _place_of(target, "streaming" in asked)
    report, undo = Report(), list[Undo]()
    with ExitStack() as on_error:
        for name in SWITCHES:
            if name not in asked:
                report[name] = Outcome("not asked for")
                continue
            try:
                shown, take_back = APPLY[name](target, place)
            except Unsupported as reason:
                report[name] = Outcome("unsupported", str(reason))
                continue
            report[name] = Outcome("applied", shown)
            if take_back is not None:
                undo.append(take_back)
                on_error.callback(take_back)
        on_error.pop_all()
    _undo[target], _models[target] = undo, WeakSet(components_of(target).values())
    return report


def disable(target: Target) -> None:
    """Take back what `enable` did to `target`, to the bit; does nothing where it did nothing.

    Of weights that were changed in between the change stays. Call it before the pipeline goes, if its models stay in
    use, and before `save_pretrained` of integer weights.

    Raises:
        RuntimeError: something that was put on top since has to go first, as `share_guidance`; call it again then.
    """
    undo = _undo.get(target, [])
    while undo:
        undo[-1]()
        undo.pop()
    _undo.pop(target, None)
    _models.pop(target, None)


def _require_no_other(target: Target) -> None:
    """Two presets on one model, taken back in another order, would leave a pipeline's parts in several dtypes.

    Raises:
        TypeError: `target` is neither a pipeline nor a model.
    """
    modules = {module for model in components_of(target).values() for module in model.modules()}
    for other, models in list(_models.items()):
        for model in models if other is not target else ():
            if not modules.isdisjoint(model.modules()):
                raise ValueError(
                    f"the {type(model).__name__} of a {type(other).__name__} is under a preset already, and this "
                    f"{type(target).__name__} shares it: that one holds for both, or disable it first"
                )


def _place_of(target: Target, streams: bool) -> torch.device:
    """Where `target` computes."""
    parameter = next((p for model in components_of(target).values() for p in model.parameters()), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    return default_device() if streams and device.type == "cpu" else device
