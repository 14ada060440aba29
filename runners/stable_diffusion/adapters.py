"""LoRA adapters in files."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from diffusers.loaders import StableDiffusionLoraLoaderMixin

from runners.cli import UserError, is_out_of_memory
from runners.weight_files import check_weights, first_line


class Lora(NamedTuple):
    path: Path
    scale: float


def check_loras(loras: Sequence[Lora], option: str = "--lora") -> None:
    """Raise UserError unless each is a whole .safetensors file; `option` gave them."""
    for path, _ in loras:
        if path.suffix != ".safetensors" or not path.is_file():
            what = "must be a .safetensors file" if path.exists() else "does not exist"
            raise UserError(f"{option} {path} {what}")
        check_weights(path)


def load_loras(pipe: StableDiffusionLoraLoaderMixin, loras: Sequence[Lora]) -> None:
    """Put the adapters into `pipe`, all of them in effect.

    Raises:
        UserError: a file is no adapter, or one of another model.
    """
    for number, (path, _) in enumerate(loras):
        try:
            pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=f"lora_{number}")
        except Exception as error:  # of any kind: the file is the user's
            if is_out_of_memory(error):
                raise
            raise UserError(f"--lora {path} does not fit this model: {first_line(error)}") from error
        if f"lora_{number}" not in chain(*pipe.get_list_adapters().values()):
            raise UserError(f"--lora {path} does not fit this model: none of its weights is of a layer here")
    if loras:
        pipe.set_adapters([f"lora_{number}" for number in range(len(loras))], [lora.scale for lora in loras])
