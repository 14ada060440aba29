"""One edit: what the pipeline is called with, and how its result was made."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import PIL.Image
import torch
from diffusers.pipelines.hidream_image.editing_images import fit_image, to_rgb

from ascend import compile_module, compile_pipeline
from ascend.device import DeviceManager
from processors import enable_fused_kernels, enable_step_cache
from processors.step_cache import computed_blocks
from runners.devices import check_compiler
from runners.hidream.adapters import adapters_in_use
from runners.hidream.arguments import E1_1, Family
from runners.hidream.edits import Edit
from runners.hidream.model import Editor
from runners.overflow import OverflowWatch, overflow_warning


class Result(NamedTuple):
    """A picture as large as its source, the size that the model saw, `(width, height)`, and what may be wrong."""

    image: PIL.Image.Image
    processed: tuple[int, int]
    warning: str | None


def accelerate(editor: Editor, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Switch on what the arguments ask for. The result says of each flag what it did."""
    models = [editor.pipe, *filter(None, [editor.refiner])]
    flags: dict[str, Any] = {}
    if args.FA:
        flags["FA"] = [enable_fused_kernels(model) for model in models]
    if args.dynamo:
        check_compiler(device)
        in_blocks = args.step_cache is not None  # a graph of all blocks cannot leave any out
        flags["dynamo"] = [
            compile_pipeline(editor.pipe, by_block=in_blocks),
            *(compile_module(model, by_block=in_blocks) for model in models[1:]),
        ]
    if args.step_cache:
        flags["step_cache"] = [enable_step_cache(model, *args.step_cache) for model in models]
    return flags


def count_full_steps(editor: Editor) -> int:
    """Those that both transformers made since a step cache was enabled."""
    return sum(computed_blocks(model)[-1] for model in (editor.pipe.transformer, editor.refiner) if model is not None)


def edit_picture(
    edit: Edit,
    source: PIL.Image.Image,
    editor: Editor,
    args: argparse.Namespace,
    family: Family,
    manager: DeviceManager,
    on_step_end: Callable[..., dict[str, Any]] | None = None,
) -> Result:
    """What `editor` makes of `source`.

    Args:
        args: of the command line, after `complete`.
        on_step_end: as the pipeline's `callback_on_step_end`; what it raises ends the edit and leaves nothing behind.

    Raises:
        ValueError: the model takes no such picture.
    """
    image = to_rgb(source)
    policy: dict[str, Any] = {"size_policy": family.size_policy, "enlarge": args.enlarge}
    if editor.side:
        policy, shown = {}, image.resize((editor.side, editor.side), PIL.Image.Resampling.BICUBIC)
        processed = shown.size
    else:
        shown, processed = image, fit_image(image, family.size_policy, args.enlarge).image.size
    watch = OverflowWatch(manager.device)

    def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        watch.see(step)
        return tensors if on_step_end is None else on_step_end(pipe, step, timestep, tensors)

    (result,) = editor.pipe(
        prompt_of(edit, args.prompt),
        image=shown,
        target_prompt=edit.target_description,
        negative_prompt=args.negative_prompt,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
        image_guidance_scale=args.image_guidance_scale,
        refine_strength=args.refine_strength,
        refiner=editor.refiner,
        clip_cfg_norm=args.clip_cfg_norm,
        generator=manager.create_generator(edit.seed),
        callback_on_step_end=after_step if watch.is_on else on_step_end,
        **policy,
    ).images
    advice = "try a lower --guidance_scale"
    if args.dtype == torch.float16 and not args.residual_dtype:
        advice += ", or --residual_dtype float32, which holds larger sums"
    warning = watch.warning(args.steps, advice) or overflow_warning([result], manager.device, advice)
    if editor.side:
        result = result.resize(image.size, PIL.Image.Resampling.BICUBIC)
    return Result(result, processed, warning)


def prompt_of(edit: Edit, template: str) -> str:
    """As the model was trained to read it. Without a description E1-Full reads the instruction in its place."""
    instruction = edit.instruction if template == E1_1.prompt else edit.instruction.removesuffix(".")
    return template.format(instruction=instruction, description=edit.target_description or edit.instruction)


def describe(
    edit: Edit, args: argparse.Namespace, source: PIL.Image.Image, processed: tuple[int, int]
) -> dict[str, Any]:
    """How a result was made, with the keys of the original's."""
    return {
        "instruction": edit.instruction,
        "target_description": edit.target_description,
        "negative_instruction": args.negative_prompt,
        "guidance_scale": args.guidance_scale,
        "img_guidance_scale": args.image_guidance_scale,
        "steps": args.steps,
        "refine_strength": args.refine_strength,
        "clip_cfg_norm": args.clip_cfg_norm,
        "seed": edit.seed,
        "input_image": str(edit.image),
        "original_size": list(to_rgb(source).size),
        "processed_size": list(processed),
        **adapters_in_use(args),
    }
