"""CANN's `atc`, which makes an NPU's offline model (.om) of an ONNX file: its command line, and running it.

What it takes: CANN's "ATC Tool User Guide"; the pages are named by the flags.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ONNX_FRAMEWORK = 5
LAST_LINES = 15  # of what atc says, in an error
# Names of families, which are no chip's: `npu-smi info` shows which of these it is.
FAMILY_NAMES = {
    "Ascend310P": "Ascend310P1 or Ascend310P3",
    "Ascend310B": "Ascend310B1 or Ascend310B4",
    "Ascend910": "Ascend910A or Ascend910ProA, and of an Atlas A2 Ascend910B1 to Ascend910B4",
    "Ascend910B": "Ascend910B1, Ascend910B2, Ascend910B3 or Ascend910B4",
    "Ascend910_93": "Ascend910_9391, Ascend910_9392, Ascend910_9381, Ascend910_9382, Ascend910_9372 or Ascend910_9362",
}


class AtcError(RuntimeError):
    """atc is not there, was asked for something it does not do, or failed."""


def check_soc_version(name: str) -> str:
    """The chip's name as atc wants it, with "Ascend" in front.

    Raises:
        AtcError: it is a family's name, or none at all.
    """
    full = name if name.lower().startswith("ascend") else f"Ascend{name}"
    full = "Ascend" + full[len("Ascend") :]
    if full in FAMILY_NAMES:
        raise AtcError(
            f"'{name}' is a family of chips, and an offline model is for one: take {FAMILY_NAMES[full]}, whichever "
            "`npu-smi info` shows, with Ascend in front"
        )
    if not re.fullmatch(r"Ascend\d[0-9A-Za-z_]*", full):
        raise AtcError(
            f"'{name}' is no chip's name: take what `npu-smi info` shows, with Ascend in front, as Ascend310P3"
        )
    return full


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
        others: further options of atc by their names.
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
            AtcError: the options exclude each other, as atc would say after it has read the model.
        """
        self._check_profiles()
        options: dict[str, object] = {
            "model": self.model,
            "framework": ONNX_FRAMEWORK,
            "output": self.output.with_suffix(""),
            "soc_version": check_soc_version(self.soc_version),
            "log": "error",
        }
        if self.input_shapes:
            shapes = (f"{name}:{','.join(map(str, shape))}" for name, shape in self.input_shapes.items())
            # Profiles of batches and AIPP want a layout that has a batch, the other profiles one that has none.
            has_batch = bool(self.insert_op_conf or self.dynamic_batch_sizes)
            options |= {"input_format": "NCHW" if has_batch else "ND", "input_shape": ";".join(shapes)}
        if self.dynamic_batch_sizes:
            options["dynamic_batch_size"] = ",".join(map(str, self.dynamic_batch_sizes))
        if self.dynamic_dims:
            options["dynamic_dims"] = ";".join(",".join(map(str, profile)) for profile in self.dynamic_dims)
        if self.precision_mode:
            options["precision_mode"] = self.precision_mode
        if self.insert_op_conf:
            options["insert_op_conf"] = self.insert_op_conf
        return [program, *(f"--{name}={value}" for name, value in (options | dict(self.others)).items())]

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
            file.write(" ".join(command) + "\n\n")
            file.flush()
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
        # A file that depends on the host is called so.
        found = [path for path in (made, made.with_stem(f"{made.stem}_linux_{platform.machine()}")) if path.exists()]
        if code or not found:
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LAST_LINES:]
            reason = f"ended with exit code {code}" if code else "left no .om"
            raise AtcError(f"atc {reason}, all it said is in {log}; its last lines:\n" + "\n".join(said))
        found[0].replace(call.output)
    return call.output
