"""HiDream-E1's pipeline and what refines, where the arguments want them."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers import HiDreamImageEditingPipeline, HiDreamImageTransformer2DModel
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM, T5EncoderModel

from ascend.device import DeviceManager
from ascend.planner import MemoryPlan, PlanError, Request, apply_plan, plan_memory
from ascend.planner.activity import FROM_DISK
from ascend.planner.memory_plan import LARGEST_BLOCK, bytes_while_streamed
from ascend.planner.plan import gib
from ascend.streaming import Buffers, stream_module
from ascend.streaming.blocks import bytes_of
from processors import enable_fused_kernels
from runners.cli import UserError, is_out_of_memory
from runners.hidream.adapters import bytes_of_adapters, check_adapters, load_adapters
from runners.hidream.arguments import REFINER, Family
from runners.hidream.loaded import check_loaded
from runners.model_dir import DEFAULTS, INDEX, check_is_pipeline, read_json
from runners.overflow import saturates
from runners.report import Report
from runners.weight_files import check_weights, first_line

PIPELINE, DRAWING = "HiDreamImageEditingPipeline", "HiDreamImagePipeline"
LLAMA = ("text_encoder_4", "tokenizer_4")


class Editor(NamedTuple):
    """What edits, and what refines if that is another transformer.

    Attributes:
        side: what pictures are squeezed to, where the model wants that.
    """

    pipe: HiDreamImageEditingPipeline
    refiner: HiDreamImageTransformer2DModel | None
    side: int | None


def complete(args: argparse.Namespace, family: Family) -> None:
    """Check the model's folder, and fill in what the arguments leave to it or to the original's scripts.

    Raises:
        UserError: it is no model of HiDream-E1, or lacks something.
    """
    _check_pipeline(args)
    check_adapters(args)
    for file in sorted(args.model_path.glob("*/*.safetensors")):
        check_weights(file)
    absent = [name for name in LLAMA if not (args.model_path / name).is_dir()]
    if absent and args.llama_path is None:
        raise UserError(f"{args.model_path} has no {' and no '.join(absent)}: --llama_path names Llama's folder")
    _complete_refiner(args)
    defaults = _defaults(args.model_path / DEFAULTS)
    for name in ("guidance_scale", "image_guidance_scale", "negative_prompt"):
        if getattr(args, name) is None:
            setattr(args, name, defaults.get(name, getattr(family, name)))
    args.side, args.prompt = defaults.get("side"), defaults.get("prompt", family.prompt)


def _check_pipeline(args: argparse.Namespace) -> None:
    """Raises UserError where the folder holds no pipeline that edits, by itself or with the adapter that is given."""
    check_is_pipeline(args.model_path)
    found = read_json(args.model_path / INDEX).get("_class_name")
    if found == DRAWING and not args.edit_lora:
        raise UserError(
            f"{args.model_path} holds a {DRAWING}, which draws: --edit_lora names HiDream-E1-Full's adapter, with "
            "which it edits"
        )
    if found not in (PIPELINE, DRAWING):
        raise UserError(f"{args.model_path} holds a {found}, and what edits is a {PIPELINE}")


def _complete_refiner(args: argparse.Namespace) -> None:
    """The folder's own refiner where none is named. Raises UserError where refining is asked for and nothing draws."""
    if args.refiner_path is None and not args.edit_lora and (args.model_path / REFINER).is_dir():
        args.refiner_path = args.model_path / REFINER
    if args.refine_strength > 0 and args.refiner_path is None and not args.edit_lora:
        raise UserError(
            f"--refine_strength {args.refine_strength:g} wants a transformer that draws: --refiner_path names the "
            "folder of HiDream-I1-Full's, or 0 leaves it out; an adapter of --edit_lora is switched off for it"
        )


def _defaults(path: Path) -> dict[str, Any]:
    """What a model wants other than the original's scripts. Raises UserError for values of other kinds."""
    defaults = read_json(path) if path.exists() else {}
    numbers = [defaults.get(name, 1.0) for name in ("guidance_scale", "image_guidance_scale")]
    try:
        str(defaults.get("prompt", "")).format(instruction="", description="")
        known = True
    except (KeyError, IndexError, ValueError):
        known = False
    texts = [defaults.get(name, "") for name in ("prompt", "negative_prompt")]
    if (
        not known
        or not all(isinstance(number, int | float) for number in numbers)
        or not all(isinstance(text, str) for text in texts)
        or not isinstance(defaults.get("side", 16), int)
    ):
        raise UserError(
            f"{path} must hold numbers as guidance_scale and image_guidance_scale, a whole number as side, and as "
            "prompt a text with {instruction} and {description}"
        )
    return defaults


def load_editor(
    args: argparse.Namespace,
    family: Family,
    manager: DeviceManager,
    dtype: torch.dtype,
    size: tuple[int, int],
    report: Report,
) -> Editor:
    """The pipeline where its memory allows it, for pictures of `size`, `(height, width)`; see `--memory`.

    Raises:
        UserError: no placement fits, or a file cannot be loaded.
    """
    has_refiner = args.refine_strength > 0 and args.refiner_path is not None
    plan = _plan(args, manager.device, dtype, size, report)
    given: dict[str, Any] = {}
    try:
        if args.llama_path:
            given["tokenizer_4"] = AutoTokenizer.from_pretrained(args.llama_path, local_files_only=True)
            given["text_encoder_4"] = LlamaForCausalLM.from_pretrained(
                args.llama_path, dtype=dtype, local_files_only=True
            )
        pipe = HiDreamImageEditingPipeline.from_pretrained(
            args.model_path, dtype=dtype, local_files_only=True, **given
        )
        refiner = (
            HiDreamImageTransformer2DModel.from_pretrained(args.refiner_path, dtype=dtype, local_files_only=True)
            if has_refiner
            else None
        )
    except Exception as error:  # of any kind: the files are the user's
        if is_out_of_memory(error):
            raise
        raise UserError(f"cannot load the model in {args.model_path}: {first_line(error)}") from error
    check_loaded(_folders_of(pipe, refiner, args))
    if family.max_seq and args.side is None:
        pipe.transformer.max_seq = family.max_seq
    if args.t5 == "host" and manager.device.type == "cpu":
        report.warn("--t5 has no effect on the CPU, where all read with the host")
    if args.residual_dtype == str(dtype).removeprefix("torch."):
        report.warn(f"--residual_dtype has no effect: the model computes in {args.residual_dtype}")
    elif args.residual_dtype:
        for transformer in filter(None, (pipe.transformer, refiner)):
            transformer.residual_dtype = getattr(torch, args.residual_dtype)
        if plan is not None:
            report.warn("the plan does not count --residual_dtype: a tensor of each branch's tokens is twice as large")
    from_disk = plan is not None and any(placement.where == FROM_DISK for placement in plan.placements)
    if args.FA and not from_disk:  # before, as stacking experts' weights leaves gaps in a device's memory
        enable_fused_kernels(pipe)
        if refiner is not None:
            enable_fused_kernels(refiner)
    if not from_disk:
        load_adapters(pipe, args)
    t5, on_host = pipe.text_encoder_3, _reads_on_host(args, manager.device)
    if on_host and plan is None:
        pipe.text_encoder_3 = None  # or all its gigabytes would pass through the device
    _place(pipe, refiner, plan, manager.device, args.model_path)
    if on_host:
        pipe.text_encoder_3 = keep_on_host(t5)
        print("T5 reads texts with the host: float16 on this chip would clip its largest values (--t5)", flush=True)
    if from_disk:  # whose weights have the names that they have in the files
        load_adapters(pipe, args)
    return Editor(pipe, refiner, args.side)


def _folders_of(pipe: Any, refiner: Any, args: argparse.Namespace) -> dict[Path, nn.Module]:
    """The models, by where their files are."""
    models = {name: model for name, model in pipe.components.items() if isinstance(model, nn.Module)}
    folders = {args.model_path / name: model for name, model in models.items()}
    if args.llama_path:
        folders[args.llama_path] = folders.pop(args.model_path / LLAMA[0])
    return folders | ({args.refiner_path: refiner} if refiner is not None else {})


def _reads_on_host(args: argparse.Namespace, device: torch.device) -> bool:
    """Whether T5 stays with the host: it computes parts in float32, which 310P does as in float16, and clips."""
    return device.type != "cpu" and (args.t5 == "host" or args.t5 == "auto" and saturates(device))


def keep_on_host(model: T5EncoderModel) -> T5EncoderModel:
    """Let `model` compute with the host, whatever hooks placed it elsewhere; results go to where the texts were."""
    remove_hook_from_module(model, recurse=True)
    model.to("cpu")
    add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    return model


def _plan(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype, size: tuple[int, int], report: Report
) -> MemoryPlan | None:
    """None where all stays on the device; the table is printed otherwise, and the second transformer is streamed."""
    if device.type == "cpu" and args.memory in ("auto", "resident"):
        if args.memory_limit is not None:
            report.warn("--memory_limit has no effect on the CPU: models are in the host's memory")
        return None
    request = Request(*size, guidance=args.guidance_scale > 1, image=True)
    limit = args.memory_limit
    fused, prepare = (True, fuse_hidream) if args.FA else (None, None)
    find = partial(plan_memory, args.model_path, device, request, dtype, args.steps)
    try:
        plan = find(args.memory, limit, fused, prepare)
        refiner = _without_values(args.refiner_path, dtype) if args.refine_strength > 0 and args.refiner_path else None
        beside = bytes_of_adapters(args)
        whole = beside + (bytes_of(refiner) if refiner else 0)
        if plan.is_resident and (args.memory == "resident" or plan.required + whole <= plan.limit):
            return None
        if args.memory == "auto" and whole:
            beside += bytes_while_streamed(refiner) if refiner else 0
            print(f"{gib(beside)} of the device are left for adapters and a second transformer, which is streamed")
            plan = find(args.memory, plan.limit - beside, fused, prepare)
    except (PlanError, ValueError) as error:
        raise UserError(str(error)) from error
    print(plan.table(), flush=True)
    return plan


def fuse_hidream(model: torch.nn.Module) -> None:
    """As --FA has HiDream's transformer compute. Other models are left alone: a plan knows how they attend."""
    if isinstance(model, HiDreamImageTransformer2DModel):
        enable_fused_kernels(model)


def _without_values(folder: Path, dtype: torch.dtype) -> HiDreamImageTransformer2DModel:
    config = HiDreamImageTransformer2DModel.load_config(folder)
    with torch.device("meta"):
        return HiDreamImageTransformer2DModel.from_config(config).to(dtype)


def _place(
    pipe: HiDreamImageEditingPipeline,
    refiner: HiDreamImageTransformer2DModel | None,
    plan: MemoryPlan | None,
    device: torch.device,
    folder: Path,
) -> None:
    if plan is None:
        pipe.to(device, silence_dtype_warnings=True)
        if refiner is not None:
            refiner.to(device)
        return
    try:
        buffers: Buffers = apply_plan(pipe, plan, device, folder)
    except ValueError as error:
        raise UserError(f"--memory: {error}") from error
    if refiner is not None:
        stream_module(refiner, device, buffers, LARGEST_BLOCK)
