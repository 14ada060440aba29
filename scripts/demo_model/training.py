"""The training loop of the demo model: resumable, with a progress bar, the same on a CPU, a GPU and an NPU."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from runners.cli import UserError

EMA_DECAY = 0.995
WARMUP_STEPS = 50
MAX_GRADIENT_NORM = 1.0


def fit(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    steps: int,
    learning_rate: float,
    checkpoint: Path,
    save_every: int = 100,
    on_save: Callable[[int], None] | None = None,
) -> None:
    """Train `model` in place for `steps` steps of AdamW and leave it with the running average of its weights.

    Args:
        model: all that is trained. Frozen networks stay outside.
        loss: maps a step's number to a scalar loss; it has to draw its data and its noise from that number alone,
            so that a resumed run ends where an uninterrupted one does.
        steps: length of the schedule: a linear warmup, then a cosine down to zero.
        learning_rate: the peak of the schedule.
        checkpoint: file to go on from if it is there, rewritten every `save_every` steps and at the end.
        on_save: called with the number of steps done whenever the file was written; `model` then holds the
            averaged weights.

    Raises:
        UserError: the checkpoint was made for another number of steps, so its schedule is another one.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    average = {name: value.detach().clone() for name, value in model.named_parameters()}
    done = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=next(model.parameters()).device, weights_only=True)
        if state["steps"] != steps:
            raise UserError(f"{checkpoint} belongs to a run of {state['steps']} steps, not {steps}: remove it first")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, done = state["average"], state["done"]

    model.train()
    bar = tqdm(range(done, steps), desc=checkpoint.stem, initial=done, total=steps, unit="step", mininterval=2)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(step, steps)
        optimizer.zero_grad()
        value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        update_average(average, model, step)
        done = step + 1
        if done % 10 == 0:
            bar.set_postfix(loss=f"{value.item():.4f}")
        if done % save_every == 0 or done == steps:
            state = {"steps": steps, "done": done, "average": average}
            save_tensors(state | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
            if on_save is not None:
                trained = {name: value.detach().clone() for name, value in model.named_parameters()}
                model.load_state_dict(average, strict=False)
                on_save(done)
                model.load_state_dict(trained, strict=False)
                model.train()
    model.load_state_dict(average, strict=False)
    model.eval()


def schedule(step: int, steps: int) -> float:
    """The learning rate at a step as a share of its peak."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def update_average(average: dict[str, Tensor], model: nn.Module, step: int, decay: float = EMA_DECAY) -> None:
    """Move the running average towards the model; it forgets faster while the run is young."""
    decay = min(decay, (step + 1) / (step + 10))
    parameters = list(model.named_parameters())
    torch._foreach_lerp_([average[name] for name, _ in parameters], [value for _, value in parameters], 1 - decay)


def save_tensors(state: object, path: Path) -> None:
    """torch.save that leaves either the whole new file or the old one."""
    temporary = path.with_name(path.name + ".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def save_grid(images: np.ndarray, path: Path, columns: int = 8) -> None:
    """Write uint8 pictures [count, height, width, 3] as one PNG, `columns` to a row; black fills up the last."""
    count, height, width, channels = images.shape
    rows = math.ceil(count / columns)
    cells = np.zeros((rows * columns, height, width, channels), dtype=np.uint8)
    cells[:count] = images
    grid = cells.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    temporary = path.with_name("." + path.name)
    Image.fromarray(grid.reshape(rows * height, columns * width, channels)).save(temporary)
    os.replace(temporary, path)
