"""From the settings of a training to its result, on this rank."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from diffusers import DDPMScheduler, SchedulerMixin, StableDiffusionPipeline
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

from ascend.chips import FUSION_ATTENTION, family_of, has_operator
from ascend.device import DeviceManager, get_accelerator_type, get_chip, get_device_info, inference_dtypes
from ascend.memory import keep_freed_memory
from ascend.parallel import world_size
from processors.presets.training import prepare_for_training
from runners.checkpoint import check_model
from runners.cli import UserError, one_line_errors
from runners.devices import DTYPES
from runners.files import make_output_dir, write_json
from runners.model_dir import DEFAULTS, Model, load_pipeline, require_patched_diffusers
from runners.report import Report
from runners.training.arguments import parse_arguments
from runners.training.cache import InputCache, Sizes
from runners.training.checkpoints import Checkpoint, Checkpoints, one_training_in
from runners.training.inputs import Inputs, prepare_inputs
from runners.training.loop import Trainer
from runners.training.network import LORA_FILE, averaged, load_unet, make_trainable, save_adapter
from runners.training.objective import PREDICTIONS
from runners.training.pictures import Skipped
from runners.training.settings import Settings

MIXED = {torch.float32: "no", torch.float16: "fp16", torch.bfloat16: "bf16"}
SHARDED = (BasicTransformerBlock, ResnetBlock2D)  # what is gathered at a time where ranks share weights
SKIPPED = "skipped.json"
PIPELINE = "pipeline"


def train(settings: Settings) -> None:
    """Train as `settings` say. With several ranks, each calls this after torchrun, accelerate or Ray started it.

    Raises:
        UserError: something in the settings, the data or the model has to be changed.
        DeviceError: there is no such device.
    """
    require_patched_diffusers()
    model = check_model(settings.model_path)
    make_output_dir(settings.output_dir)
    device = training_device(settings.device)
    if device.type == "cpu":
        keep_freed_memory()
    dtype = training_dtype(settings, device)
    with ExitStack() as stack:
        accelerator = stack.enter_context(accelerate(settings, device, dtype))
        if accelerator.is_main_process:
            stack.enter_context(one_training_in(settings.output_dir))
        train_rank(settings, model, accelerator, dtype)


def training_device(name: str | None) -> torch.device:
    """Where this rank trains. Raises DeviceError, or UserError for a chip that is made for inference alone."""
    local_rank = os.environ.get("LOCAL_RANK")
    name = name or os.environ.get("PREFERRED_DEVICE") or get_accelerator_type()
    if local_rank is not None and name in ("npu", "cuda"):
        name = f"{name}:{local_rank}"
    device = DeviceManager(name).device
    chip = get_chip(device)
    if family_of(chip) is not None and not has_operator(chip, FUSION_ATTENTION):
        raise UserError(
            f"{chip} is made for inference, and CANN has no training on it: train on a 910B, a GPU or the CPU "
            "(--device cpu), and draw with the result here"
        )
    return device


def training_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """That of the products. Raises UserError: the device does not compute in it."""
    if settings.precision is None:
        return inference_dtypes(device)[0] if settings.switches["mixed_precision"] else torch.float32
    dtype = DTYPES[settings.precision]
    if dtype not in inference_dtypes(device) or (dtype == torch.float16 and device.type == "cpu"):
        raise UserError(f"--dtype {settings.precision}: training on {device} is not possible in it; use float32")
    return dtype


@contextmanager
def accelerate(settings: Settings, device: torch.device, dtype: torch.dtype) -> Iterator[Accelerator]:
    """An Accelerator, whose process group and settings, which are the process's, end with the block."""
    plugin = None
    if settings.full and world_size() > 1 and device.type != "cpu":
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=MIXED[dtype],
        gradient_accumulation_steps=settings.gradient_accumulation,
        log_with="tensorboard",
        project_dir=settings.output_dir / "logs",
        fsdp_plugin=plugin,
    )
    try:
        if accelerator.device.type != device.type:
            raise UserError(f"--device {device.type}: accelerate takes {accelerator.device.type} on this machine")
        yield accelerator
    finally:
        accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)


def train_rank(settings: Settings, model: Model, accelerator: Accelerator, dtype: torch.dtype) -> None:
    """What one process does."""
    resolution = settings.resolution or size_of(model)
    settings = replace(settings, resolution=resolution)
    report, skipped, digest = Report(), Skipped(), model.digest()
    noise_schedule = load_noise_schedule(model, settings)
    checkpoints = Checkpoints(settings.output_dir / "checkpoints", settings.keep_checkpoints)
    about = {"model": digest, "settings": settings.decisive(accelerator.num_processes)}
    checkpoint = find_checkpoint(checkpoints, settings, about, report, accelerator.is_main_process)

    encoder = Encoder(settings, model, accelerator.device)
    sizes = Sizes.of(resolution, settings.aspect_ratio_buckets)
    cache = InputCache(settings.cache_dir, digest, sizes, settings.random_flip, encoder.load)
    inputs = prepare_inputs(cache, settings, accelerator, skipped)
    about["examples"] = inputs.digest()
    if accelerator.is_main_process:
        if checkpoint is not None and checkpoint.about.get("examples") != about["examples"]:
            report.warn(
                f"--resume: pictures or captions are others than before, now {len(inputs.examples)}, so this does not "
                "lead to the weights of an uninterrupted training"
            )
        tell_skipped(skipped, settings, report)
        tell_of_inputs(inputs, report)
        tell_of_prediction(noise_schedule, settings, model, report)
        if not accelerator.log_with:  # accelerate leaves out what is not installed without a word
            report.warn("there will be no logs for TensorBoard: pip install -r requirements-training.txt")
        if settings.full and accelerator.num_processes > 1 and accelerator.device.type == "cpu":
            report.warn(
                "--full on CPUs: every rank holds all weights, as accelerate shares them out on NPUs and GPUs only"
            )

    unet = load_unet(model, settings.model_path, torch.float32 if settings.full else dtype)
    make_trainable(unet, settings)
    presets = prepare_for_training(unet, settings.switches, accelerator.device, dtype)
    if accelerator.is_fsdp2:  # which knows classes by their names alone, and fused kernels have classes of their own
        names = {type(module).__name__ for module in unet.modules() if isinstance(module, SHARDED)}
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(names)
    trainer = Trainer(settings, accelerator, unet, presets, noise_schedule, inputs, about, encoder.for_drawing())
    start = 0
    if checkpoint is not None:
        trainer.restore(checkpoint)
        start = checkpoint.step
    if accelerator.is_main_process:
        print(presets, flush=True)
        print(
            f"{len(inputs.examples)} pictures, {trainer.batches.steps_per_epoch} steps an epoch, from step {start}, "
            f"devices: {accelerator.num_processes}"
        )
        # What is after the checkpoint's own step is drawn again.
        accelerator.init_trackers("", init_kwargs={"tensorboard": {"purge_step": start + 1}})
    trainer.run(start)
    with averaged(trainer.model, trainer.average):
        save_result(trainer, settings, model)
    if accelerator.is_main_process:
        report.sections = {
            "settings": {name: str(value) for name, value in vars(settings).items()},
            "device": {**get_device_info(accelerator.device), "dtype": str(dtype)},
            "presets": {name: str(outcome) for name, outcome in presets.items()},
            "devices": accelerator.num_processes,
            "pictures": len(inputs.examples),
        }
        report.write(settings.output_dir / "report.json")
        print(f"{PIPELINE if settings.full else LORA_FILE} and report.json are in {settings.output_dir}")


def tell_of_inputs(inputs: Inputs, report: Report) -> None:
    """What of the examples is trained otherwise than it is given."""
    cut = [example.cut for example in inputs.examples if example.cut]
    if cut:
        report.warn(f"{len(cut)} captions are cut, by up to {max(cut)} tokens: the text encoder reads no more")
    enlarged = sum(example.enlarged for example in inputs.examples)
    if enlarged:
        report.warn(
            f"{enlarged} of {len(inputs.examples)} pictures are smaller than they are trained, and are enlarged: a "
            "lower --resolution would not blur them"
        )


def tell_of_prediction(noise_schedule: DDPMScheduler, settings: Settings, model: Model, report: Report) -> None:
    """An adapter's file has no place for what the UNet says with it."""
    said, own = noise_schedule.config.prediction_type, model.configs["scheduler"].get("prediction_type", "epsilon")
    if not settings.full and said != own:
        report.warn(
            f"--prediction_type {said}: the adapter draws only with a model whose scheduler/scheduler_config.json has "
            f"that prediction_type, and {settings.model_path} has {own}"
        )


def load_noise_schedule(model: Model, settings: Settings) -> DDPMScheduler:
    """The model's, with the prediction that is trained. Raises UserError: there is no loss for that one."""
    noise_schedule = DDPMScheduler.from_config(model.configs["scheduler"])
    set_prediction(noise_schedule, settings)
    prediction = noise_schedule.config.prediction_type
    if prediction not in PREDICTIONS:
        raise UserError(
            f"the scheduler of {settings.model_path} has prediction_type {prediction!r}, which is not trained here: "
            f"--prediction_type is one of {', '.join(PREDICTIONS)}"
        )
    return noise_schedule


def set_prediction(scheduler: SchedulerMixin, settings: Settings) -> None:
    """Have a scheduler take what the UNet says for what it is trained to say."""
    if settings.prediction_type:
        scheduler.register_to_config(prediction_type=settings.prediction_type)


def size_of(model: Model) -> int:
    """The side of the pictures that a model was made for, in pixels."""
    factor = 2 ** (len(model.configs["vae"]["block_out_channels"]) - 1)
    return int(model.configs["unet"]["sample_size"]) * factor


class Encoder:
    """The pipeline without its UNet, loaded when it is first needed."""

    def __init__(self, settings: Settings, model: Model, device: torch.device) -> None:
        self.settings, self.model, self.device = settings, model, device
        self.pipe: StableDiffusionPipeline | None = None

    def load(self) -> StableDiffusionPipeline:
        """In float32, on the device."""
        if self.pipe is None:
            self.pipe = load_pipeline(
                StableDiffusionPipeline, self.settings.model_path, torch.float32, self.model, unet=None
            ).to(self.device)
            set_prediction(self.pipe.scheduler, self.settings)
        return self.pipe

    def for_drawing(self) -> StableDiffusionPipeline | None:
        """In host memory, if there are pictures to draw; else what was loaded is let go."""
        pipe = self.load().to("cpu") if self.settings.validation_prompts else None
        self.pipe = None
        if pipe is not None:
            pipe.set_progress_bar_config(disable=True)
        return pipe


def find_checkpoint(
    checkpoints: Checkpoints, settings: Settings, about: dict[str, Any], report: Report, main: bool
) -> Checkpoint | None:
    """The one to go on from; None to begin.

    Raises:
        UserError: there are some and --resume was not asked for, or the last one is of another model or adapter, or of
            a step after the last that is asked for.
    """
    if main:
        checkpoints.remove_scratch()
    steps = checkpoints.steps()
    if not settings.resume:
        if steps:
            raise UserError(
                f"{settings.output_dir} has checkpoints, the last of step {steps[-1]}: go on with --resume, or take "
                "another --output_dir"
            )
        return None
    if not steps:
        return None
    checkpoint = checkpoints.load(steps[-1])
    if checkpoint.about["model"] != about["model"]:
        raise UserError(f"--resume: {checkpoints.folder} is of another model than {settings.model_path}")
    before, now = checkpoint.about["settings"], json_words(about["settings"])
    different = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    shapes = [name for name in different if name == "full" or name.startswith("lora_") or name == "switches"]
    if shapes:
        changes = ", ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in shapes)
        raise UserError(f"--resume: {checkpoints.folder} holds other weights than these settings train: {changes}")
    if checkpoint.step > settings.steps:
        raise UserError(
            f"--resume: the last checkpoint in {checkpoints.folder} is of step {checkpoint.step}, beyond --steps "
            f"{settings.steps}: remove those after that step to go on from an earlier one"
        )
    if different and main:
        changes = ", ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in different)
        report.warn(f"--resume with other settings, so not to the weights of an uninterrupted training: {changes}")
    return checkpoint


def json_words(settings: dict[str, Any]) -> dict[str, Any]:
    """As they come back from a file."""
    words: dict[str, Any] = json.loads(json.dumps(settings))
    return words


def tell_skipped(skipped: Skipped, settings: Settings, report: Report) -> None:
    (settings.output_dir / SKIPPED).unlink(missing_ok=True)  # of the part of a training before --resume
    if skipped.reasons:
        write_json(settings.output_dir / SKIPPED, dict(skipped.reasons))
        name, reason = next(iter(skipped.reasons.items()))
        report.warn(
            f"{len(skipped.reasons)} pictures are left out, as {name}: {reason}; all are in "
            f"{settings.output_dir / SKIPPED}"
        )


def save_result(trainer: Trainer, settings: Settings, model: Model) -> None:
    """The adapter's file, or the whole pipeline as a folder, in the output folder. All ranks take part."""
    weights = trainer.weights()
    if not trainer.accelerator.is_main_process:
        return
    with tempfile.TemporaryDirectory(dir=settings.output_dir, prefix=".") as scratch:
        name = PIPELINE if settings.full else LORA_FILE
        target, made = settings.output_dir / name, Path(scratch, name)
        if settings.full:
            save_pipeline(model, settings, weights, made)
            if target.exists():
                target.replace(Path(scratch, "old"))
        else:
            save_adapter(trainer.model, Path(scratch))
        made.replace(target)


def save_pipeline(model: Model, settings: Settings, weights: dict[str, torch.Tensor], made: Path) -> None:
    """Write to `made` the pipeline that was trained with other weights of its UNet, all in float32."""
    pipe = load_pipeline(StableDiffusionPipeline, settings.model_path, torch.float32, model)
    set_prediction(pipe.scheduler, settings)
    pipe.unet.load_state_dict(weights)
    pipe.save_pretrained(made)
    if (settings.model_path / DEFAULTS).exists():
        shutil.copy(settings.model_path / DEFAULTS, made)


def main(description: str | None, folder: Path, arguments: Sequence[str] | None = None) -> None:
    """Run the command line of the program that `description` describes, in `folder`."""
    with one_line_errors():
        train(parse_arguments(description, folder, arguments))
