"""The LoRA adapters of a run: E1-Full's, which makes an editing model of one that draws, and others beside it."""

from __future__ import annotations

import argparse
from typing import Any

from diffusers import HiDreamImageEditingPipeline

from processors import load_adapter
from runners.cli import UserError, is_out_of_memory
from runners.stable_diffusion.adapters import Lora, check_loras
from runners.weight_files import digest_of_file, first_line


def check_adapters(args: argparse.Namespace) -> None:
    """Raise UserError unless each file is a whole .safetensors file."""
    for option, lora in _adapters(args).values():
        check_loras([lora], option)


def load_adapters(pipe: HiDreamImageEditingPipeline, args: argparse.Namespace) -> None:
    """Put the adapters into `pipe`, all of them in effect with their scales.

    Raises:
        UserError: a file is no adapter, or one of another model.
    """
    adapters = _adapters(args)
    for name, (option, lora) in adapters.items():
        try:
            load_adapter(pipe, lora.path, name)
        except Exception as error:  # of any kind: the file is the user's
            if is_out_of_memory(error):
                raise
            raise UserError(f"{option} {lora.path} does not fit this model: {first_line(error)}") from error
    if adapters:
        pipe.set_adapters(list(adapters), [lora.scale for _, lora in adapters.values()])


def adapters_in_use(args: argparse.Namespace) -> dict[str, Any]:
    """For the metadata of a result."""
    given: dict[str, Any] = {}
    if args.edit_lora:
        given["edit_lora"] = {str(args.edit_lora.path): args.edit_lora.scale}
    if args.lora:
        given["lora"] = {str(lora.path): lora.scale for lora in args.lora}
    return given


def settings_of_adapters(args: argparse.Namespace) -> dict[str, Any]:
    """What of the adapters decides what results look like; nothing without any."""
    found = [(option, digest_of_file(lora.path), lora.scale) for option, lora in _adapters(args).values()]
    return {"adapters": found} if found else {}


def bytes_of_adapters(args: argparse.Namespace) -> int:
    """In their files, which have 2 bytes a value like the models, or more."""
    return sum(lora.path.stat().st_size for _, lora in _adapters(args).values())


def _adapters(args: argparse.Namespace) -> dict[str, tuple[str, Lora]]:
    """Their options and files, by their names in the pipeline."""
    editing = {"edit": ("--edit_lora", args.edit_lora)} if args.edit_lora else {}
    return editing | {f"lora_{number}": ("--lora", lora) for number, lora in enumerate(args.lora)}
