"""Estimate a picture's time on cards, beside the times that Ascend published.

    python scripts/emulator/predict_picture.py                          # Atlas 300I Duo, both chips, 50 steps of DDIM
    python scripts/emulator/predict_picture.py --chip Ascend910B4 --chips 1 --steps 20

prints what each published picture takes nominally, and what the others predict of it; then estimates of ours, 512 x
512 with --FA --dynamo and guidance. It runs no network: what its parts take was recorded by record_work.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from diffusers import DDIMScheduler

from emulator import EmulatorError, calibration, profile
from runners.cache_options import DEFAULT_INTERVAL, FAST, cache_options, count_steps, fast_options
from runners.cli import ArgumentParser, UserError, one_line_errors, positive_float, positive_int

ROWS = {1: "1 row", 2: "2 rows"}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="predict_picture.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--chip", choices=calibration.recorded_chips(), default="Ascend310P3", help="(Ascend310P3)")
    add("--chips", type=int, choices=(1, 2), default=2, help="that share a picture, a branch of guidance each (2)")
    add("--model", choices=("sd2.1-base", "sd1.5"), default="sd2.1-base", help="(sd2.1-base)")
    add("--steps", type=positive_int, default=50, metavar="N", help="(50)")
    add("--guidance_scale", type=positive_float, default=7.5, metavar="SCALE", help="more than 1 (7.5)")
    args = parser.parse_args(arguments)
    if args.guidance_scale <= 1:
        parser.error(f"argument --guidance_scale: {args.guidance_scale} is no guidance: it must be more than 1")
    return args


def count_parts(options: dict[str, Any], steps: int, chips: int) -> dict[str, int]:
    """How often one of `chips` that share a picture runs each part, with the pipeline's arguments `options`.

    Raises:
        UserError: the schedule does not fit `steps`.
    """
    rows = 2 // chips
    counts = {"full_steps": steps, "shallow_steps": 0}
    if options:
        counts = count_steps(DDIMScheduler(), steps, options)
    # Each chip runs the shallow steps of a forecast, which are of one branch, by itself.
    shallow_rows = 1 if options.get("cache_forecast") else rows
    return {
        f"UNet, {ROWS[rows]}": counts["full_steps"],
        f"UNet cut at 0,0, {ROWS[shallow_rows]}": counts["shallow_steps"],
        "text encoder": 2,
        "VAE decoder": 1,
    }


def methods(guidance_scale: float) -> dict[str, dict[str, Any]]:
    fast = {f"--fast {row}": fast_options(row, guidance_scale) for row in FAST}
    return {"all steps": {}, f"--DC {DEFAULT_INTERVAL}": cache_options(0, None), **fast}


def format_published(factor: calibration.Factor, pictures: Sequence[calibration.Picture]) -> str:
    """A table of what the other pictures predict of each, and all of those that were held out."""
    lines = [
        "| card | model | steps | nominal s | published s | factor | predicted by the others, s | off by |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for picture in pictures:
        nominal = picture.nominal_seconds()
        others = factor.without(picture).estimate(nominal)
        card = calibration.chips()[picture.chip]["card"]
        method = picture.method + (", held out" if picture.held_out else "")
        lines.append(
            f"| {card} | {picture.model} | {method} | {nominal:.3f} | {picture.seconds:.2f} | {picture.factor():.2f}"
            f" | {others.text()} | {others.middle / picture.seconds - 1:+.0%} |"
        )
    return "\n".join(lines)


def format_predicted(args: argparse.Namespace, factor: calibration.Factor) -> str:
    lines = ["| | full steps | shallow | nominal s | estimated s |", "|---|---:|---:|---:|---:|"]
    for name, options in methods(args.guidance_scale).items():
        try:
            parts = count_parts(options, args.steps, args.chips)
        except UserError:  # which run_sd.py refuses as well, with the reason
            lines.append(f"| {name} | not with {args.steps} steps | | | |")
            continue
        nominal = calibration.nominal_seconds(args.chip, args.model, parts)
        full, shallow, *_ = parts.values()
        lines.append(f"| {name} | {full} | {shallow} | {nominal:.3f} | {factor.estimate(nominal).text()} |")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    soc = calibration.chips().get(args.chip, {"profile": args.chip})["profile"]
    try:
        chip = profile.load(soc)
        factor = calibration.factor_of(chip)
        calibration.check_recorded(args.chip, chip)
        print(format_published(factor, calibration.published_pictures(soc)))
        print(
            f"\n{args.model}, {args.steps} steps, guidance {args.guidance_scale:g}, on {args.chips} of {args.chip}:\n"
        )
        print(format_predicted(args, factor))
    except EmulatorError as error:
        raise UserError(str(error)) from error
    print(f"\nestimated: {factor.label()}")


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        run(parse_arguments(arguments))


if __name__ == "__main__":
    main()
