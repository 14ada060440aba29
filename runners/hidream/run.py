"""What HiDream-E1's runners do: they edit one picture after the other."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
from diffusers.pipelines.hidream_image.editing_images import fit_image

from ascend import share_guidance, share_model
from ascend.device import DeviceManager, get_device_info
from ascend.memory import keep_freed_memory
from ascend.parallel import Mesh, choose_branch_size, process_group, world_size
from runners.cli import FAILED, UserError, fail, is_out_of_memory, one_line_errors
from runners.devices import choose_device, choose_dtype
from runners.files import make_output_dir, write_json
from runners.hidream.adapters import settings_of_adapters
from runners.hidream.arguments import Family, parse_arguments
from runners.hidream.editing import accelerate, count_full_steps, describe, edit_picture
from runners.hidream.edits import Edit, list_edits, open_picture
from runners.hidream.model import Editor, complete, load_editor
from runners.hidream.refine_instruction import check_endpoint, refine_edit
from runners.images import save_png
from runners.model_dir import require_patched_diffusers
from runners.report import Report, versions
from runners.weight_files import digest_of_files

MODEL_FILES = (".safetensors", ".json", ".model", ".txt")
APPEARANCE = ("negative_prompt", "steps", "guidance_scale", "image_guidance_scale", "refine_strength", "clip_cfg_norm")


def run(args: argparse.Namespace, family: Family) -> None:
    require_patched_diffusers()
    report = Report()
    complete(args, family)
    edits = list_edits(args)
    sizes = [_model_size(open_picture(edit.image), args, family, edit) for edit in edits]  # before anything is loaded
    if args.refine_instruction:
        check_endpoint()
        if world_size() > 1:
            raise UserError(
                "--refine_instruction: several devices would each get other words; refine with "
                "instruction_refinement.py first"
            )
    elif args.refine_strength > 0 and not all(edit.target_description for edit in edits):
        report.warn(
            "without --target_description refining goes towards the instruction, as if that described a picture, and "
            "may spoil the result: describe it, or leave refining out (--no-refine)"
        )
    if args.lora and args.refine_strength > 0:
        report.warn("refining goes without the adapters of --lora, which are of what edits")
    args.output_dir = make_output_dir(args.output_dir)
    manager = choose_device(args, report)
    if manager.device.type == "cpu":
        keep_freed_memory()
    args.dtype = choose_dtype(args, manager, report)
    settings = _settings(args, family, manager)
    waiting = [edit for edit in edits if not _is_complete(edit, settings, args.output_dir)]
    if len(waiting) < len(edits) and int(os.environ.get("RANK", "0")) == 0:
        print(f"{len(edits) - len(waiting)} of {len(edits)} results are there already")
    if not waiting:
        return
    largest = max(sizes, key=lambda size: size[0] * size[1])
    with process_group(manager.device, choose_branch_size(world_size(), args.guidance_scale > 1)) as mesh:
        mesh.require_same(settings | {"edits": [edit.name for edit in waiting]})
        failures = _run_rank(
            [waiting[n] for n in mesh.share(len(waiting))], largest, args, family, manager, mesh, settings, report
        )
        everywhere = mesh.gather(failures)
    if everywhere is None:
        return
    failures = dict(sum((list(each.items()) for each in everywhere), []))
    report.sections |= {"settings": settings, "failures": failures, "devices": mesh.world_size}
    report.write(args.output_dir / "report.json")
    peak = report.sections["peak_memory"] / 2**20
    print(f"{len(waiting) - len(failures)} results and report.json are in {args.output_dir}, peak {peak:.0f} MiB")
    if failures:
        fail(f"{len(failures)} pictures were not edited; the same command tries them again", FAILED)


def _run_rank(
    edits: Sequence[Edit],
    size: tuple[int, int],
    args: argparse.Namespace,
    family: Family,
    manager: DeviceManager,
    mesh: Mesh,
    settings: dict[str, Any],
    report: Report,
) -> dict[str, str]:
    """What one process does: it makes its share of the results. Why some were not made, by their names."""
    editor = load_editor(args, family, manager, args.dtype, size, report)
    flags = accelerate(editor, args, manager.device)
    share_guidance(editor.pipe, mesh)
    if editor.refiner is not None:
        share_model(editor.refiner, mesh)
    about = {"device": {**get_device_info(manager.device), "dtype": str(args.dtype)}, "flags": flags}
    report.sections = dict(about)
    if args.step_cache:
        _warn_of_step_cache(args.step_cache[0], editor, mesh, report)
    editor.pipe.set_progress_bar_config(disable=mesh.rank > 0)
    manager.reset_peak_memory()
    failures = _edit_all(edits, editor, args, family, manager, mesh, settings, about, report)
    report.sections["peak_memory"] = manager.memory_stats()["peak"]
    return failures


def _warn_of_step_cache(name: str, editor: Editor, mesh: Mesh, report: Report) -> None:
    if hasattr(editor.pipe.transformer, "_hf_hook"):
        report.warn("--step_cache: blocks that are left out are brought to the device all the same")
    if name == "first_block" and mesh.branch_size > 1:
        report.warn(
            "--step_cache first_block: each device decides by its own branches, so that results are not those of one "
            "device; taylorseer has one schedule for all"
        )


def _edit_all(
    edits: Sequence[Edit],
    editor: Editor,
    args: argparse.Namespace,
    family: Family,
    manager: DeviceManager,
    mesh: Mesh,
    settings: dict[str, Any],
    about: dict[str, Any],
    report: Report,
) -> dict[str, str]:
    failures: dict[str, str] = {}
    for number, edit in enumerate(edits, start=1):
        if mesh.rank == 0:
            print(f"{number} of {len(edits)}: {edit.image.name}: {edit.instruction}", flush=True)
        full_steps = count_full_steps(editor) if args.step_cache else 0
        start = time.perf_counter()
        try:
            source = open_picture(edit.image)
            wanted = refine_edit(edit, args.refine_instruction) if args.refine_instruction else edit
            result = edit_picture(wanted, source, editor, args, family, manager)
        except Exception as error:
            failures[edit.name] = _reason(error)
            print(f"error: {edit.image}: {failures[edit.name]}", file=sys.stderr)
            manager.empty_cache()
            continue
        seconds = time.perf_counter() - start
        if result.warning:
            report.warn(f"{edit.name}: {result.warning}")
        if mesh.branch:
            continue
        cached: dict[str, Any] = {}
        if args.step_cache:
            cached = {"step_cache": list(args.step_cache), "full_steps": count_full_steps(editor) - full_steps}
            report.sections.setdefault("full_steps", {})[edit.name] = cached["full_steps"]
            print(f"{cached['full_steps']} of {args.steps} steps were computed in full")
        metadata = describe(wanted, args, source, result.processed) | cached | about
        if wanted is not edit:
            metadata["original_instruction"] = edit.instruction
        entry = {"digest": edit.digest(settings), "seconds": seconds, "versions": versions()}
        _write(result.image, args.output_dir / edit.name, metadata, entry)
    return failures


def _reason(error: Exception) -> str:
    """Why a picture was not edited. Raises what is no fault of the picture or of memory."""
    if is_out_of_memory(error):
        return "out of memory"
    if isinstance(error, ValueError | UserError):
        return str(error)
    raise error


def _write(image: PIL.Image.Image, path: Path, metadata: dict[str, Any], entry: dict[str, Any]) -> None:
    """The picture with its metadata, and then the file that says that the result is whole."""
    save_png(image, path.with_name(f"{path.name}.png"), {name: json.dumps(each) for name, each in metadata.items()})
    write_json(path.with_name(f"{path.name}.json"), metadata | entry)


def _model_size(image: PIL.Image.Image, args: argparse.Namespace, family: Family, edit: Edit) -> tuple[int, int]:
    """Height and width that the model sees. Raises UserError."""
    if args.side:
        return args.side, args.side
    try:
        width, height = fit_image(image, family.size_policy, args.enlarge).image.size
    except ValueError as error:
        raise UserError(f"{edit.image}: {error}") from error
    return height, width


def _settings(args: argparse.Namespace, family: Family, manager: DeviceManager) -> dict[str, Any]:
    """All that decides what results look like, beside pictures and instructions."""
    folders = [args.model_path, *filter(None, (args.refiner_path, args.llama_path))]
    # Configurations and tokenizers too; what a folder holds beside a model's files is not looked at.
    files = [[file for file in sorted(folder.rglob("*")) if file.suffix in MODEL_FILES] for folder in folders]
    weights = [digest_of_files(folder, found) for folder, found in zip(folders, files, strict=True)]
    return {
        name: getattr(args, name)
        for name in (*APPEARANCE, "FA", "enlarge", "refine_instruction", "residual_dtype", "t5")
    } | {
        "family": family.name,
        "weights": weights,
        "dtype": str(args.dtype),
        "device": manager.device.type,
        **settings_of_adapters(args),
        **({"step_cache": args.step_cache} if args.step_cache else {}),
    }


def _is_complete(edit: Edit, settings: dict[str, Any], folder: Path) -> bool:
    """Raises UserError where there is a result of that name of another picture or another setting."""
    try:
        about = json.loads((folder / f"{edit.name}.json").read_text(encoding="utf-8"))
        digest = about["digest"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
    if digest != edit.digest(settings):
        raise UserError(
            f"{folder} has a result '{edit.name}' of another picture, instruction or setting; take another "
            "--output_dir, or delete it"
        )
    return (folder / f"{edit.name}.png").exists()


def main(
    program: str, description: str | None, family: Family, folder: Path, arguments: Sequence[str] | None = None
) -> None:
    """Run the command line of `program`, which `description` describes, in `folder`, beside its demo model."""
    with one_line_errors():
        run(parse_arguments(program, description, family, folder, arguments), family)
