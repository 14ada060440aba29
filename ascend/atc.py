"""CANN's `atc`, which makes an NPU's offline model (.om) of an ONNX file: its command line, and running it.

What it takes: CANN's "ATC Tool User Guide"; the pages are named by the flags.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ONNX_FRAMEWORK = 5
IMAGE_SIZES = "dynamic_image_size"  # profiles of heights and widths, a further option
LAST_LINES = 15  # of what atc says, in an error
# What --model, --output and --insert_op_conf do not take (hicann/ge, base/common/util.cc: IsPathCharsValid).
FOREIGN_TO_PATHS = re.compile(r"[^A-Za-z0-9_./\u4e00-\u9fa5-]")
# Families, whose names are no chips': `npu-smi info` shows which of these it is.
CHIPS_OF = {
    "Ascend310P": ("Ascend310P1", "Ascend310P3"),
    "Ascend310B": ("Ascend310B1", "Ascend310B4"),
    "Ascend910": ("Ascend910A", "Ascend910ProA"),
    "Ascend910B": ("Ascend910B1", "Ascend910B2", "Ascend910B3", "Ascend910B4"),
    "Ascend910_93": tuple(f"Ascend910_93{chip}" for chip in ("91", "92", "81", "82", "72", "62")),
}


class AtcError(RuntimeError):
    """atc is not there, was asked for something it does not do, or failed."""


def check_soc_version(name: str) -> str:
    """The chip's name as atc wants it, with "Ascend" in front.

    Raises:
        AtcError: it is a family's name, one in other letters than the chip's, or none at all.
    """
    full = "Ascend" + re.sub("^ascend", "", name, flags=re.IGNORECASE)
    known = sorted([*CHIPS_OF, *(chip for chips in CHIPS_OF.values() for chip in chips)], key=len, reverse=True)
    start = next((each for each in known if full.lower().startswith(each.lower())), "")
    spelt = start + full[len(start) :]
    if spelt in CHIPS_OF:
        of_atlas_a2 = "; an Atlas A2 is one of Ascend910B" if spelt == "Ascend910" else ""
        raise AtcError(
            f"'{name}' is a family of chips, and an offline model is for one: take {' or '.join(CHIPS_OF[spelt])}, "
            f"whichever `npu-smi info` shows, with Ascend in front{of_atlas_a2}"
        )
    if spelt != full:
        raise AtcError(f"'{name}' is spelt {spelt}: atc tells small letters from capitals")
    if not re.fullmatch(r"Ascend\d[0-9A-Za-z_]*", full):
        raise AtcError(
            f"'{name}' is no chip's name: take what `npu-smi info` shows, with Ascend in front, as Ascend310P3"
        )
    return full


def check_path(path: str | os.PathLike[str]) -> None:
    """Raise AtcError for a path that atc does not take, so that this is known before there is a model to convert."""
    foreign = FOREIGN_TO_PATHS.search(os.fspath(path))
    if foreign:
        raise AtcError(
            f"atc does not take the path '{path}', which has '{foreign[0]}': letters a to z, digits, Chinese, and "
            "any of _ - . are what it may have"
        )


@dataclass(frozen=True)
class AtcCall:
    """What atc is asked for.

    Attributes:
        model: the ONNX file.
        output: of the offline model, ending in .om.
        input_shapes: of each input; -1 stands for a dimension that the profiles give.
        dynamic_batch_sizes: profiles: the first dimension of every input that has -1 there.
        dynamic_dims: profiles: of each, the value of every -1 of all inputs, in order.
        precision_mode: atc's own default, force_fp16, if None.
        insert_op_conf: file of AIPP, which prepares pictures on the device.
        others: further options of atc by their names, none of which is given by the above.
    """

    model: Path
    output: Path
    soc_version: str
    input_shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    dynamic_batch_sizes: Sequence[int] = ()
    dynamic_dims: Sequence[Sequence[int]] = ()
    precision_mode: str | None = None
    insert_op_conf: Path | None = None
    others: Mapping[str, str] = field(default_factory=dict)

    def command(self, program: str = "atc") -> list[str]:
        """The command line.

        Raises:
            AtcError: atc would refuse it, for most of this only after it has read the model.
        """
        chip = check_soc_version(self.soc_version)
        # atc looks at where a file that it reads lies behind all links, and at its output's path as it is given.
        for path in (self.model, self.insert_op_conf):
            if path:
                check_path(os.path.realpath(path))
        check_path(self.output)
        self._check_profiles()
        shapes = (f"{name}:{','.join(map(str, shape))}" for name, shape in self.input_shapes.items())
        options: dict[str, object] = {
            "model": self.model,
            "framework": ONNX_FRAMEWORK,
            "output": self.output.with_suffix(""),
            "soc_version": chip,
            "log": "error",
            "input_shape": ";".join(shapes),
            "dynamic_batch_size": ",".join(map(str, self.dynamic_batch_sizes)),
            "dynamic_dims": ";".join(",".join(map(str, profile)) for profile in self.dynamic_dims),
            "precision_mode": self.precision_mode,
            "insert_op_conf": self.insert_op_conf,
        }
        if self.input_shapes:
            # Profiles of batches and pictures, and AIPP, want a layout that has a batch, --dynamic_dims one without.
            is_of_pictures = self.insert_op_conf or self.dynamic_batch_sizes or IMAGE_SIZES in self.others
            options["input_format"] = "NCHW" if is_of_pictures else "ND"
        overruled = [name for name in self.others if name in options]
        if overruled:
            raise AtcError(f"{', '.join(overruled)}: no further option, it is made of this call's own arguments")
        given = {name: value for name, value in (options | dict(self.others)).items() if value not in (None, "")}
        return [program, *(f"--{name}={value}" for name, value in given.items())]

    def _check_profiles(self) -> None:
        unknown = sum(size == -1 for shape in self.input_shapes.values() for size in shape)
        given = [name for name in ("dynamic_batch_sizes", "dynamic_dims") if getattr(self, name)]
        if self.dynamic_dims and self.insert_op_conf:
            raise AtcError("dynamic_dims and AIPP exclude each other: take dynamic_batch_sizes")
        if len(given) > 1:
            raise AtcError(f"{' and '.join(given)} exclude each other")
        if given and not self.input_shapes:
            raise AtcError(f"{given[0]} needs the shapes of the inputs, in which -1 stands for what it gives")
        profiles = self.dynamic_dims or self.dynamic_batch_sizes
        if profiles and not 2 <= len(profiles) <= 100:
            raise AtcError(f"there are {len(profiles)} profiles, and atc takes 2 to 100")
        if profiles and not unknown:
            raise AtcError(f"{given[0]} gives values of -1, and no input has one in its shape")
        for profile in self.dynamic_dims:
            if len(profile) != unknown:
                raise AtcError(
                    f"the profile {','.join(map(str, profile))} of dynamic_dims has {len(profile)} values, and the "
                    f"inputs have {unknown} times -1: each needs its own, as {','.join(['1'] * unknown)}"
                )
        if unknown and not given and IMAGE_SIZES not in self.others:
            raise AtcError(
                "an input has -1 in its shape, and no profile says what it stands for: give dynamic_dims; models of "
                "unlimited shapes are not run here"
            )
        if self.dynamic_batch_sizes:
            for name, shape in self.input_shapes.items():
                if -1 in shape[1:]:
                    raise AtcError(f"input {name}: dynamic_batch_sizes is for the first dimension alone, not {shape}")


def find_atc() -> str:
    """Where atc is. Raises AtcError."""
    found = shutil.which("atc")
    if found is None:
        raise AtcError("atc is not on PATH: it is a part of CANN's toolkit; source its set_env.sh first")
    return found


def run_atc(call: AtcCall, log: Path) -> Path:
    """Make `call.output`, which is whole or absent, and return it. `log` gets all that atc says.

    Raises:
        AtcError: atc failed; the message has the end of what it said.
    """
    program = find_atc()
    with tempfile.TemporaryDirectory(dir=call.output.parent, prefix="atc_") as folder:
        made = Path(folder) / call.output.name
        scratch = AtcCall(**{**vars(call), "output": made})
        command = scratch.command(program)
        with log.open("w", encoding="utf-8") as file:  # atc writes its errors to stdout
            file.write(shlex.join(command) + "\n\n")
            file.flush()
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
        # A file that depends on the host is called so.
        found = [path for path in (made, made.with_stem(f"{made.stem}_linux_{platform.machine()}")) if path.exists()]
        if code or not found:
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LAST_LINES:]
            reason = f"ended with exit code {code}" if code else "left no .om"
            if code < 0:
                reason = f"was ended by {signal.Signals(-code).name}"
            raise AtcError(f"atc {reason}, all it said is in {log}; its last lines:\n" + "\n".join(said))
        found[0].replace(call.output)
    return call.output
