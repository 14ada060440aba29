"""Score the demo editor: make held-out edits and see by image analysis whether they were made, and nothing else was.

    python scripts/demo_hidream/evaluate.py
    python scripts/demo_hidream/evaluate.py --num_edits 50 --refine_strengths 0 0.3 0.5

Prints a line for each strength of refining, and for the demo model's VAE alone, which no editor can exceed. Writes
scores.json and a sheet of source, instruction and results to --output_dir. Training never saw these edits.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import HiDreamImageEditingPipeline, HiDreamImageTransformer2DModel
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from runners.cli import ArgumentParser, file_path, finite_float, non_negative_int, one_line_errors, positive_int
from runners.devices import DTYPES, choose_device, choose_dtype
from runners.files import make_output_dir
from runners.model_dir import DEFAULTS, require_patched_diffusers
from runners.report import Report, format_table
from scripts.demo_hidream.edits import KINDS, Edit, EditScore, held_out_edits, score_edit
from scripts.demo_hidream.train import DEMO_MODEL, REFINER
from scripts.demo_model.scenes import IMAGE_SIZE
from scripts.demo_model.training import save_grid

ASPECTS = ("object", "colour", "place", "rest", "all")
VAE_ALONE = "VAE alone"
SHEET_EDITS = 40
FONT_SIZE = 14


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = add_arguments("evaluate.py", __doc__)
    add = parser.add_argument_group("what to compare").add_argument
    add("--refine_strengths", type=finite_float, nargs="+", default=[0.0, 0.3], metavar="R", help="(0 0.3)")
    add = parser.add_argument_group("output").add_argument
    add(
        "--output_dir",
        type=file_path,
        default=Path("outputs/evaluate_hidream"),
        metavar="DIR",
        help="(outputs/evaluate_hidream)",
    )
    return complete(parser.parse_args(arguments))


def add_arguments(program: str, description: str | None) -> ArgumentParser:
    """Those of every program that makes held-out edits; see `complete`."""
    parser = ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("what to edit").add_argument
    add("--model_path", type=file_path, default=DEMO_MODEL, metavar="DIR", help="(the demo editor)")
    add("--num_edits", type=positive_int, default=200, metavar="N", help="held-out edits (200)")
    add("--steps", type=positive_int, default=28, metavar="N", help="denoising steps (28)")
    add("--guidance_scale", type=finite_float, metavar="G", help=f"(what {DEFAULTS} of the model says)")
    add("--image_guidance_scale", type=finite_float, metavar="G", help=f"(what {DEFAULTS} of the model says)")
    add("--seed", type=non_negative_int, default=0, metavar="N", help="of the first picture, the next has N+1 ... (0)")
    add("--batch_size", type=positive_int, default=20, metavar="N", help="pictures made together (20)")
    add = parser.add_argument_group("where to compute").add_argument
    add("--device", metavar="NAME", help="npu, cuda or cpu, or one of several as npu:1 (the best there is)")
    add("--dtype", choices=DTYPES, help="(the device's best)")
    parser.set_defaults(local_rank=None, soc_version=None)
    return parser


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """With what the model's folder says of guidance where the arguments do not."""
    defaults = args.model_path / DEFAULTS
    known = json.loads(defaults.read_text()) if defaults.exists() else {}
    args.guidance_scale = args.guidance_scale or known.get("guidance_scale", 5.0)
    args.image_guidance_scale = args.image_guidance_scale or known.get("image_guidance_scale", 2.0)
    return args


def make_edits(
    pipe: HiDreamImageEditingPipeline, edits: Sequence[Edit], args: argparse.Namespace, name: str, **options: Any
) -> np.ndarray:
    """The results, uint8 [count, height, width, 3]. Each has its own seed, whatever the batch size."""
    pictures = []
    for start in tqdm(range(0, len(edits), args.batch_size), desc=name, unit="batch"):
        batch = edits[start : start + args.batch_size]
        edited = pipe(
            [edit.instruction() for edit in batch],
            target_prompt=[edit.target.description() for edit in batch],
            image=[Image.fromarray(edit.source.render()) for edit in batch],
            num_inference_steps=args.steps,
            guidance_scale=args.guidance_scale,
            image_guidance_scale=args.image_guidance_scale,
            generator=[torch.Generator().manual_seed(args.seed + start + number) for number in range(len(batch))],
            output_type="np",
            **options,
        ).images
        pictures.append((edited * 255).round().astype(np.uint8))
    return np.concatenate(pictures)


@torch.no_grad()
def reconstruct(pipe: HiDreamImageEditingPipeline, edits: Sequence[Edit], batch_size: int) -> np.ndarray:
    """What the VAE makes of the right results, as `make_edits` returns them."""
    vae, processor, pictures = pipe.vae, pipe.image_processor, []
    for start in range(0, len(edits), batch_size):
        images = [Image.fromarray(edit.target.render()) for edit in edits[start : start + batch_size]]
        latents = vae.encode(processor.preprocess(images).to(vae.device, vae.dtype)).latent_dist.mode()
        decoded = processor.postprocess(vae.decode(latents).sample, output_type="np")
        pictures.append((decoded * 255).round().astype(np.uint8))
    return np.concatenate(pictures)


def percentages(scores: Sequence[EditScore]) -> dict[str, float]:
    return {aspect: 100 * float(np.mean([getattr(score, aspect) for score in scores])) for aspect in ASPECTS}


def sheet(edits: Sequence[Edit], results: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of source, instruction and each of `results`, as one column of cells uint8 [cells, height, width, 3]."""
    cells = []
    for number, edit in enumerate(edits):
        cells += [edit.source.render(), write(edit.instruction()), *(pictures[number] for pictures in results)]
    return np.stack(cells)


def write(text: str) -> np.ndarray:
    """Black on white, as uint8 [128, 128, 3]."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "white")
    lines = "\n".join(textwrap.wrap(text, width=16))
    ImageDraw.Draw(image).multiline_text((6, 12), lines, fill="black", font=ImageFont.load_default(FONT_SIZE))
    return np.asarray(image)


def run(args: argparse.Namespace) -> None:
    require_patched_diffusers()
    report = Report()
    output_dir = make_output_dir(args.output_dir)
    manager = choose_device(args, report)
    dtype = choose_dtype(args, manager, report)
    pipe = HiDreamImageEditingPipeline.from_pretrained(args.model_path, dtype=dtype).to(manager.device)
    refiner = HiDreamImageTransformer2DModel.from_pretrained(args.model_path / REFINER, dtype=dtype)
    refiner.to(manager.device)
    pipe.set_progress_bar_config(disable=True)
    edits = held_out_edits(args.num_edits, args.seed)

    results = {VAE_ALONE: reconstruct(pipe, edits, args.batch_size)}
    seconds: dict[str, float | None] = {VAE_ALONE: None}
    for strength in args.refine_strengths:
        name, start = f"refined {strength:g}" if strength else "edited", time.perf_counter()
        results[name] = make_edits(pipe, edits, args, name, refine_strength=strength, refiner=refiner)
        seconds[name] = time.perf_counter() - start

    report.sections = {"settings": {**vars(args), "model_path": str(args.model_path)}, "scores": {}, "kinds": {}}
    report.sections["settings"].pop("output_dir")
    report.sections["pictures"] = {}
    rows: list[tuple[str, Sequence[float | None], str]] = []
    for name, pictures in results.items():
        scores = [score_edit(picture, edit) for picture, edit in zip(pictures, edits, strict=True)]
        shares = percentages(scores)
        rows.append((name, [*shares.values(), seconds[name]], ".1f"))
        report.sections["scores"][name] = shares
        report.sections["kinds"][name] = {
            kind: percentages([score for score, edit in zip(scores, edits, strict=True) if edit.kind == kind])
            for kind in KINDS[: args.num_edits]  # of fewer edits than kinds, some have none
        }
        report.sections["pictures"][name] = [
            {"instruction": edit.instruction(), **asdict(score)} for edit, score in zip(edits, scores, strict=True)
        ]
    edited = [pictures for name, pictures in results.items() if name != VAE_ALONE]
    save_grid(sheet(edits[:SHEET_EDITS], edited), output_dir / "sheet.png", columns=2 * (2 + len(edited)))
    report.write(output_dir / "scores.json")
    print(format_table([f"{aspect} %" for aspect in ASPECTS] + ["seconds"], rows))
    print(f"scores.json and a sheet of sources, instructions and results are in {output_dir}")


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        run(parse_arguments(arguments))


if __name__ == "__main__":
    main()
