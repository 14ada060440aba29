"""What a run leaves behind: pictures, the comparison, and the table in the terminal."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from PIL import Image

from runners.images import GridRow, save_png, side_by_side, similarity
from runners.report import format_table, versions
from runners.stable_diffusion.inputs import steps_drawn
from runners.stable_diffusion.pictures import Call, Costs, seeds_of

if TYPE_CHECKING:
    from runners.clip import CLIPInferenceService


def save_pictures(call: Call, args: argparse.Namespace, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Write the PNG files of `call`, with prompt, seed and `about` in each. The result lists them for the report."""
    prompt = args.prompts[call.number]
    chunks = {name: json.dumps(content) for name, content in {**about, "versions": versions()}.items()}
    entries: list[dict[str, Any]] = []
    for index, (seed, image) in enumerate(zip(seeds_of(args, call.number), call.images, strict=True)):
        name = f"{call.number * args.num_images + index:03d}_{slug(prompt)}_{seed}.png"
        save_png(image, args.output_dir / name, {"prompt": prompt, "seed": str(seed), **chunks})
        seconds = call.seconds / len(call.images)
        entries.append({"file": name, "prompt": prompt, "seed": seed, "seconds": seconds, "warnings": call.warnings})
    return entries


def slug(prompt: str) -> str:
    """The beginning of a prompt as a part of a file name."""
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:40]


def compare(
    plain: tuple[Costs, Sequence[Image.Image]],
    drawn: tuple[Costs, Sequence[Image.Image]],
    args: argparse.Namespace,
    scorer: CLIPInferenceService | None = None,
) -> dict[str, Any]:
    """Write comparison.png. The result says how much faster and how different the accelerated pictures are.

    With a `scorer` also how well both fit their prompts.
    """
    (plain_costs, before), (drawn_costs, after) = plain, drawn
    captions = [prompt for prompt in args.prompts for _ in range(args.num_images)]
    rows = [GridRow(caption, pair) for caption, *pair in zip(captions, before, after, strict=True)]
    headings = [
        f"plain, {plain_costs.seconds_per_image():.2f} s",
        f"accelerated, {drawn_costs.seconds_per_image():.2f} s",
    ]
    save_png(side_by_side(headings, rows), args.output_dir / "comparison.png", {})
    comparison: dict[str, Any] = {
        "grid": "comparison.png",
        "plain": list_costs(plain_costs, args, compiled=False),
        "speed_up": plain_costs.seconds_per_image() / drawn_costs.seconds_per_image(),
        "images": [asdict(similarity(*pair)) for pair in zip(after, before, strict=True)],
    }
    if scorer:
        pictures = {"plain": before, "accelerated": after}
        comparison["clip_model"] = args.clip_model
        comparison["clip_score"] = {name: scorer.clip_scores(each, captions) for name, each in pictures.items()}
    return comparison


def list_costs(costs: Costs, args: argparse.Namespace, compiled: bool) -> dict[str, float | None]:
    return {
        "compile_seconds": costs.seconds_to_compile() if compiled else None,
        "seconds_per_image": costs.seconds_per_image(),
        "seconds_per_step": costs.seconds_per_step(steps_drawn(args)),
        "peak_memory_bytes": costs.peak_memory,
    }


def summary(sections: dict[str, Any]) -> str:
    """The costs, with --compare beside those of the plain pictures, as a table."""
    columns = {"accelerated" if any(sections["flags"].values()) else "plain": sections["costs"]}
    comparison = sections.get("comparison")
    if comparison:
        columns = {"plain": comparison["plain"], **columns}
    table = [
        ("compile (s)", [column["compile_seconds"] for column in columns.values()], ".1f"),
        ("per image (s)", [column["seconds_per_image"] for column in columns.values()], ".3f"),
        ("per step (s)", [column["seconds_per_step"] for column in columns.values()], ".4f"),
        ("peak memory (MiB)", [column["peak_memory_bytes"] / 2**20 for column in columns.values()], ".0f"),
    ]
    if comparison:
        psnr = [image["psnr"] for image in comparison["images"] if image["psnr"] is not None]
        table += [
            ("speed-up", [None, comparison["speed_up"]], ".2f"),
            ("PSNR (dB)", [None, sum(psnr) / len(psnr) if psnr else None], ".1f"),
            ("SSIM", [None, sum(image["ssim"] for image in comparison["images"]) / len(comparison["images"])], ".3f"),
        ]
        if "clip_score" in comparison:
            scores = comparison["clip_score"].values()
            table.append(("CLIP score", [sum(each) / len(each) for each in scores], ".2f"))
    return format_table(list(columns), table)
