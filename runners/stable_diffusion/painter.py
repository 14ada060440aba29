"""What a worker of generate_batch.py does: it draws pictures, one by one, on the device that Ray gave it."""

import argparse
import json
import os
import platform
import sys
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch

from ascend.device import DeviceError, DeviceManager, get_device_info
from ascend.memory import keep_freed_memory
from runners.checkpoint import check_model
from runners.cli import FAILED, UserError, is_out_of_memory
from runners.devices import choose_dtype
from runners.files import SCRATCH, write_json
from runners.images import save_png
from runners.model_dir import require_patched_diffusers
from runners.report import Report, versions
from runners.stable_diffusion.batch_rows import Picture, is_complete
from runners.stable_diffusion.encoded_prompts import EncodedPrompts
from runners.stable_diffusion.pictures import call_pipeline
from runners.stable_diffusion.pipeline import (
    accelerate,
    check_before_loading,
    make_pipeline,
    settings_in_use,
)
from runners.stable_diffusion.prompts import check_prompts, warn_of_long_prompts
from runners.stable_diffusion.row_adapters import AdapterSwitch, loras_of


class Painter:
    """Draws pictures on one device; each worker of Ray makes one and calls it row by row.

    It draws exactly as run_sd.py does, one picture in a call of the pipeline, and leaves alone what is complete, so
    that calling it again for the same row is harmless.
    """

    def __init__(self, args: argparse.Namespace, kind: str) -> None:
        self.args = argparse.Namespace(**vars(args))
        self.folder = args.output_dir / "images"
        self.refusal = ""
        try:
            self.load(kind)
        except (UserError, DeviceError) as error:  # no other worker would fare better, nor would this one later
            self.refusal = f"{error} (on {platform.node()})"

    def load(self, kind: str) -> None:
        require_patched_diffusers()
        if not self.folder.is_dir():
            raise UserError(f"{self.folder} is not there; every machine must see the same --output_dir")
        torch.set_num_threads(self.args.threads)
        report = Report()
        self.manager = DeviceManager(kind)
        if kind == "cpu":
            keep_freed_memory()
        dtype = choose_dtype(self.args, self.manager, report)
        model = check_model(self.args.model_path, self.args.config)
        if model.digest() != self.args.model_digest:  # exchanged since the run began, or another one on this machine
            raise UserError(
                f"{self.args.model_path} has not the files that the run began with, which name its pictures"
            )
        scheduler = check_before_loading(self.args, model, self.manager.device, report)
        self.pipe = make_pipeline(self.args, model, scheduler, self.manager, dtype, report)
        self.pipe.set_progress_bar_config(disable=True)
        self.encoded = EncodedPrompts(self.pipe)
        self.adapters = AdapterSwitch(self.pipe)
        self.about = {
            "flags": accelerate(self.pipe, self.args, report),
            "device": {**get_device_info(self.manager.device), "dtype": str(dtype)},
            "versions": versions(),
        }

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        """A `Picture` as a row of Ray's to what came of it. Empty text stands for none: Ray would turn None to NaN."""
        picture = Picture(**row)
        outcome = {"name": picture.name, "refusal": self.refusal, "error": "", "warning": ""}
        if self.refusal:
            return outcome
        # Grows with each attempt and stays when this process dies. Ray itself would either retry for ever or, with a
        # limit, count deaths for all pictures of a task.
        attempts = self.folder / f".{picture.name}.attempts{SCRATCH}"
        try:
            if is_complete(picture, self.folder):
                return outcome
            with attempts.open("ab") as file:
                file.write(b".")
            if attempts.stat().st_size > self.args.retries + 1:
                outcome["error"] = f"its worker died {self.args.retries + 1} times"
            else:
                outcome["warning"] = "; ".join(self.draw(picture))
        except Exception as error:
            outcome["error"] = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
            print(f"{picture.name}: {outcome['error']}", file=sys.stderr)
            self.leave_if_broken()
        with suppress(OSError):
            attempts.unlink(missing_ok=True)
        return outcome

    def draw(self, picture: Picture) -> list[str]:
        """Draw and save `picture`. The result is warnings."""
        args = argparse.Namespace(**vars(self.args))
        args.prompts, args.negative_prompt, args.seed = [picture.prompt], picture.negative_prompt, picture.seed
        args.lora = loras_of(picture.lora)
        self.adapters.use(picture.lora)
        self.encoded.adapters = picture.lora
        report = Report()
        check_prompts(args, [picture.prompt, picture.negative_prompt])
        warn_of_long_prompts(self.pipe, args, [picture.prompt, picture.negative_prompt], report)
        call = call_pipeline(self.pipe, args, self.manager, 0, args.cache, self.encoded)
        for warning in call.warnings:
            report.warn(warning)

        about = {"settings": settings_in_use(args, self.pipe), **self.about}
        path = self.folder / f"{picture.name}.png"
        chunks = {name: json.dumps(content, default=str) for name, content in about.items()}
        save_png(call.images[0], path, {"prompt": picture.prompt, "seed": str(picture.seed), **chunks})
        entry = {"file": path.name, "bytes": path.stat().st_size, **asdict(picture), "seconds": call.seconds}
        # Last: this file says that the picture is whole.
        write_json(path.with_suffix(".json"), entry | about | {"warnings": report.warnings})
        return report.warnings

    def leave_if_broken(self) -> None:
        """End this process when its device no longer computes, so that Ray starts another one for the row."""
        try:
            self.manager.empty_cache()
            torch.ones(1, device=self.manager.device).item()
        except Exception as error:
            print(f"{self.manager.device} is lost: {error}", file=sys.stderr, flush=True)
            os._exit(FAILED)
