"""The training loop, the same on one device and on several, with accelerate."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from ascend.memory import read_memory
from processors.presets.table import Report as PresetReport
from processors.presets.training import offloaded_activations
from runners.cli import UserError
from runners.files import write_atomically
from runners.training.batches import Batches, share_of
from runners.training.checkpoints import Checkpoint, Checkpoints, random_states, restore_random_states
from runners.training.drawing import draw_validation, save_validation
from runners.training.inputs import Inputs
from runners.training.network import averaged, trained
from runners.training.objective import add_noise, levels, target, weighted_error
from runners.training.settings import Settings

LOG = "losses.jsonl"
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


@dataclass
class Progress:
    """What was measured since the last line of the log; the tensors wait on the device."""

    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    since: float = field(default_factory=time.perf_counter)


class Trainer:
    """One training on this rank.

    Args:
        unet: on the CPU, made trainable.
        presets: what `prepare_for_training` did to it.
        noise_schedule: says what the UNet is to predict, too.
        about: what checkpoints have to agree in to go on from them; see `Checkpoints`.
        pipe: draws the validation pictures; its UNet is set for that time. None without such prompts.
    """

    def __init__(
        self,
        settings: Settings,
        accelerator: Accelerator,
        unet: Any,
        presets: PresetReport,
        noise_schedule: DDPMScheduler,
        inputs: Inputs,
        about: dict[str, Any],
        pipe: StableDiffusionPipeline | None,
    ) -> None:
        self.settings, self.accelerator, self.presets, self.inputs = settings, accelerator, presets, inputs
        self.about, self.pipe = about, pipe
        self.prediction = noise_schedule.config.prediction_type
        self.alphas_cumprod = noise_schedule.alphas_cumprod
        self.batches = Batches(inputs.buckets(), settings.examples_a_step(accelerator.num_processes), settings.seed)
        optimizer = torch.optim.AdamW(trained(unet), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        self.unet, self.optimizer = accelerator.prepare(unet, optimizer)
        self.learning_rate = self._new_schedule(done=0)
        self.average = self._new_average() if settings.switches["ema"] else None
        self.checkpoints = Checkpoints(settings.output_dir / "checkpoints", settings.keep_checkpoints)
        self.log = settings.output_dir / LOG
        self.progress = Progress()

    @property
    def model(self) -> Any:
        return self.accelerator.unwrap_model(self.unet)

    def weights(self) -> dict[str, Tensor]:
        """The trained weights, whole and in host memory, on rank 0. All ranks have to call it."""
        weights: dict[str, Tensor] = get_model_state_dict(self.model, options=_WHOLE)  # type: ignore[assignment]
        return {name: weight.clone() for name, weight in weights.items()}  # on the CPU they are the model's own

    def _new_schedule(self, done: int) -> LambdaLR:
        """Of the learning rate after `done` steps, by these settings and not by a checkpoint's optimizer."""
        settings, optimizer = self.settings, self.optimizer.optimizer
        for group in optimizer.param_groups:
            group |= {"initial_lr": settings.learning_rate, "weight_decay": settings.weight_decay}
        return get_scheduler(
            settings.lr_schedule, optimizer, None, settings.warmup_steps, settings.steps, last_epoch=done - 1
        )

    def _new_average(self) -> EMAModel:
        return EMAModel(trained(self.model), decay=self.settings.ema_decay, use_ema_warmup=True, foreach=True)

    def run(self, start: int) -> None:
        """The steps from `start` to the last, with checkpoints and validation pictures.

        Raises:
            UserError: the loss is no number any more. The checkpoints are from before that.
        """
        settings = self.settings
        self._cut_log(start)
        quiet = not self.accelerator.is_main_process
        with tqdm(
            range(start, settings.steps), "training", settings.steps, initial=start, unit="step", disable=quiet
        ) as bar:
            for step in bar:
                self.step(step)
                done, ends = step + 1, step + 1 == settings.steps
                saves = ends or done % settings.checkpoint_every == 0
                draws = ends or done % settings.validation_every == 0
                if saves or draws or done % settings.log_every == 0:
                    bar.set_postfix(self.write_log(done))
                if saves:
                    self.save(done)
                if draws and self.pipe is not None:
                    self.validate(done)

    def step(self, step: int) -> None:
        """One move of the optimizer. Nothing waits for the device here."""
        accelerator, parts = self.accelerator, self.settings.gradient_accumulation
        numbers = self.batches.of_step(step)
        losses = []
        for part in range(parts):
            places = share_of(numbers, accelerator.process_index, accelerator.num_processes, part, parts)
            with accelerator.accumulate(self.unet):
                with offloaded_activations(self.presets):
                    loss = self._loss([numbers[place] for place in places], step, places)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(trained(self.unet), self.settings.max_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.append(loss.detach())
        self.progress.losses.append(torch.stack(losses).mean())
        self.progress.norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        self.progress.rates.append(float(self.learning_rate.get_last_lr()[0]))
        self.learning_rate.step()
        if self.average is not None:
            self.average.step(trained(self.model))

    def _loss(self, numbers: list[int], step: int, places: range) -> Tensor:
        batch = self.inputs.batch(numbers, step, places, len(self.alphas_cumprod))
        at = levels(self.alphas_cumprod, batch.timesteps, self.prediction, self.settings.snr_gamma)
        device = self.accelerator.device
        latents, noise, timesteps, texts = (tensor.to(device, non_blocking=True) for tensor in batch)
        at = type(at)(*(tensor.to(device, non_blocking=True) for tensor in at))
        predicted = self.unet(add_noise(latents, noise, at), timesteps, texts, return_dict=False)[0]
        return weighted_error(predicted, target(latents, noise, at, self.prediction), at.weight)

    def write_log(self, done: int) -> dict[str, str]:
        """Fetch what was measured in the steps before `done`, write it down, and say the last of it."""
        progress, self.progress = self.progress, Progress()
        if not progress.losses:
            return {}
        losses = self.accelerator.reduce(torch.stack(progress.losses).float(), "mean").tolist()
        norms = torch.stack(progress.norms).float().tolist()
        first = done - len(losses)
        seconds = (time.perf_counter() - progress.since) / len(losses)
        memory = read_memory(self.accelerator.device)["peak"]
        rows = [
            {"step": first + number + 1, "loss": loss, "grad_norm": norm, "learning_rate": rate}
            for number, (loss, norm, rate) in enumerate(zip(losses, norms, progress.rates, strict=True))
        ]
        self._require_finite(rows)
        if self.accelerator.is_main_process:
            with self.log.open("a", encoding="utf-8") as log:
                log.writelines(json.dumps(row) + "\n" for row in rows)
            for row in rows:
                self.accelerator.log({name: value for name, value in row.items() if name != "step"}, row["step"])
            self.accelerator.log({"seconds a step": seconds, "peak memory (GiB)": memory / 2**30}, done)
        return {"loss": f"{losses[-1]:.4f}", "memory": f"{memory / 2**30:.2f}GiB"}

    def _require_finite(self, rows: list[dict[str, Any]]) -> None:
        scaled = self.accelerator.scaler is not None  # which skips steps whose gradients overflow
        for row in rows:
            if not math.isfinite(row["loss"]) or not (scaled or math.isfinite(row["grad_norm"])):
                steps = self.checkpoints.steps()
                last = f"the last good checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint yet"
                raise UserError(
                    f"step {row['step']}: the loss is {row['loss']:g} and the gradients' norm {row['grad_norm']:g}; "
                    f"--learning_rate {self.settings.learning_rate:g} may be too high; {last}"
                )

    def _cut_log(self, start: int) -> None:
        """Forget the steps that are done again."""
        if self.accelerator.is_main_process:
            lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
            write_atomically(self.log, "".join(f"{line}\n" for line in lines[:start]).encode())

    def save(self, done: int) -> None:
        """A checkpoint of the state after `done` steps. All ranks take part, the first one writes."""
        states = gather_object([random_states(self.accelerator.device)])
        state = {
            "weights": self.weights(),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=_WHOLE),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "random": states,
        }
        if self.average is not None:
            with averaged(self.model, self.average):
                state["average"] = self.weights()
            state["averaged_steps"] = self.average.optimization_step
        if self.accelerator.is_main_process:
            self.checkpoints.save(done, self.about, state)
        self.accelerator.wait_for_everyone()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to what `save` had."""
        state = checkpoint.state
        if self.average is not None:  # by way of the model, as weights in shards have their places there
            set_model_state_dict(self.model, state["average"], options=_WHOLE)
            self.average = self._new_average()
            self.average.optimization_step = state["averaged_steps"]
        set_model_state_dict(self.model, state["weights"], options=_WHOLE)
        set_optimizer_state_dict(self.model, self.optimizer.optimizer, state["optimizer"], options=_WHOLE)
        self.learning_rate = self._new_schedule(checkpoint.step)
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.accelerator.process_index < len(state["random"]):
            restore_random_states(state["random"][self.accelerator.process_index], self.accelerator.device)

    def validate(self, done: int) -> None:
        """The validation pictures after `done` steps, by the averaged weights where there are some."""
        assert self.pipe is not None
        # Prompts are projected outside of the UNet's forward pass, which alone has the products' dtype by itself.
        with averaged(self.model, self.average), self.accelerator.autocast():
            pictures = draw_validation(self.pipe, self.model, self.settings, self.accelerator.device)
        if self.accelerator.is_main_process:
            save_validation(pictures, self.settings, done, self.settings.output_dir / "validation")
