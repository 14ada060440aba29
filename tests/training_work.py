"""Small trainings for tests: a folder of captioned pictures, and the trainer's command line in this process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from runners.training.network import LORA_FILE
from runners.training.run import main
from tests.programs import ROOT

SIZE = 64  # pixels, so 8 x 8 latents
PROGRAM = ROOT / "examples/training/train_text_to_image.py"


def write_pictures(folder: Path, count: int = 6, size: tuple[int, int] = (SIZE, SIZE)) -> Path:
    """Noise with captions in metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"picture {number}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(data: Path, model: Path, output: Path, *more: object, steps: int = 6) -> list[str]:
    """A training on the CPU of `steps` steps of two pictures, with a checkpoint every two."""
    words = ["--data", data, "--model_path", model, "--output_dir", output, "--cache_dir", data.parent / "cache"]
    words += ["--device", "cpu", "--resolution", SIZE, "--steps", steps, "--batch_size", 2, "--checkpoint_every", 2]
    words += ["--learning_rate", "1e-3", "--log_every", 2, *(() if "--full" in more else ("--lora_rank", 4))]
    return [str(word) for word in (*words, *more)]


def train(data: Path, model: Path, output: Path, *more: object, steps: int = 6) -> Path:
    main(None, PROGRAM.parent, arguments(data, model, output, *more, steps=steps))
    return output


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / LORA_FILE)


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "losses.jsonl").read_text().splitlines()]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def step_names(output: Path) -> Sequence[str]:
    return sorted(path.name for path in (output / "checkpoints").iterdir())
