"""The command line of a training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from processors.presets.training import TRAINING_PRESETS, TRAINING_SWITCHES
from runners.cli import (
    ArgumentParser,
    UserError,
    file_path,
    finite_float,
    image_size,
    non_negative_int,
    positive_float,
    positive_int,
    text,
)
from runners.devices import DTYPES
from runners.model_dir import DEFAULTS, GUIDANCE_SCALE, guidance_scale_of
from runners.stable_diffusion.arguments import DEMO_MODEL, MAX_SEED
from runners.training.objective import PREDICTIONS
from runners.training.settings import LORA_LAYERS, Settings

LR_SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
POLYNOMIAL_END = 1e-7  # the last learning rate of diffusers' polynomial schedule
LORA_LEARNING_RATE, FULL_LEARNING_RATE = 1e-4, 1e-5
OPTIONAL = {  # what is said with the option alone that they belong to, and their defaults
    "lora_rank": 16,
    "lora_alpha": None,
    "lora_layers": "attention",
    "ema_decay": 0.999,
    "validation_every": 500,
    "validation_steps": 30,
}
SWITCHES = {
    "fused_kernels": "attention by the device's fused kernels, with their gradients",
    "ema": "keep an average of the trained weights, and draw and save with it",
    "gradient_checkpointing": "compute blocks again in the backward pass instead of keeping what is in them",
    "activation_offload": "keep what the backward pass needs in host memory",
}


def parse_arguments(description: str | None, folder: Path, arguments: Sequence[str] | None) -> Settings:
    """The settings that the command line of train_text_to_image.py in `folder` asks for."""
    parser = make_parser("train_text_to_image.py", description, folder)
    return settings_of(vars(parser.parse_args(arguments)))


def make_parser(program: str, description: str | None, folder: Path) -> ArgumentParser:
    parser = ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_arguments(parser, folder.parent / "sd2.1" / DEMO_MODEL)
    add_training_arguments(parser)
    add_speed_arguments(parser)
    add_output_arguments(parser)
    return parser


def settings_of(args: dict[str, Any]) -> Settings:
    """What `make_parser` read, with all that was left open decided. Raises UserError for what has no effect."""
    switches = choose_switches(args)
    refuse_without_effect(args, switches)
    args |= {name: default for name, default in OPTIONAL.items() if args[name] is None}
    if args["cache_dir"] is None:
        args["cache_dir"] = args["output_dir"] / "cache"
    if args["lora_alpha"] is None:
        args["lora_alpha"] = args["lora_rank"]
    if args["learning_rate"] is None:
        args["learning_rate"] = FULL_LEARNING_RATE if args["full"] else LORA_LEARNING_RATE
    if args["guidance_scale"] is None:
        args["guidance_scale"] = guidance_scale_of(args["model_path"])
    args["precision"], args["validation_prompts"] = args.pop("dtype"), tuple(args.pop("validation_prompt"))
    if args["lr_schedule"] == "polynomial" and args["learning_rate"] <= POLYNOMIAL_END:
        raise UserError(
            f"--learning_rate {args['learning_rate']:g} is not above {POLYNOMIAL_END:g}, at which --lr_schedule "
            "polynomial ends: take linear"
        )
    last_seed = args["seed"] + max(0, len(args["validation_prompts"]) - 1)
    if last_seed > MAX_SEED:
        raise UserError(
            f"--seed {args['seed']} is too large: seeds, one for each validation prompt, end at {MAX_SEED}"
        )
    return Settings(switches=switches, **args)


def refuse_without_effect(args: dict[str, Any], switches: dict[str, bool]) -> None:
    """Raises UserError for an option that the others leave nothing to say."""
    is_constant, draws = args["lr_schedule"] == "constant", args["validation_prompt"]
    rules: tuple[tuple[bool, str, tuple[str, ...]], ...] = (
        (args["full"], "with --full, which trains no adapter", ("lora_rank", "lora_alpha", "lora_layers")),
        (not switches["ema"], "without --ema, which keeps the average", ("ema_decay",)),
        (
            not draws,
            "without --validation_prompt, which says what is drawn",
            ("validation_every", "validation_steps", "guidance_scale"),
        ),
        (is_constant, "with --lr_schedule constant: take constant_with_warmup", ("warmup_steps",)),
    )
    for applies, reason, names in rules:
        for name in names:
            if applies and args[name]:
                raise UserError(f"--{name} {args[name]} has no effect {reason}")


def choose_switches(args: dict[str, Any]) -> dict[str, bool]:
    """What the preset and single flags, which are removed from `args`, say together."""
    asked = TRAINING_PRESETS[args["preset"]]
    switches = {name: name in asked for name in TRAINING_SWITCHES}
    for name in SWITCHES:
        wanted = args.pop(name)
        if wanted is not None:
            switches[name] = wanted
    if args["dtype"] is not None:
        switches["mixed_precision"] = args["dtype"] != "float32"
    return switches


def add_data_arguments(parser: ArgumentParser, demo_model: Path) -> None:
    add = parser.add_argument_group("what to learn from").add_argument
    add(
        "--data",
        type=file_path,
        required=True,
        metavar="PATH",
        help="a folder of pictures with metadata.jsonl, or a .txt beside each, or Parquet files",
    )
    add("--model_path", type=file_path, default=demo_model, metavar="DIR", help="in diffusers' layout (demo model)")
    add("--caption_column", type=text, default="text", metavar="NAME", help="of metadata.jsonl and Parquet (text)")
    add("--image_column", type=text, default="image", metavar="NAME", help="of Parquet files (image)")
    add("--resolution", type=image_size, metavar="PIXELS", help="to which pictures are cut (the model's)")
    add(
        "--aspect_ratio_buckets",
        action="store_true",
        help="keep shapes: about as many pixels, in the nearest of eleven aspect ratios",
    )
    add("--random_flip", action="store_true", help="mirror half of the pictures")
    add(
        "--caption_dropout",
        type=share,
        default=0.1,
        metavar="SHARE",
        help="of examples shown without caption, for guidance (0.1)",
    )


def add_training_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("how to learn").add_argument
    add("--steps", type=positive_int, default=1000, metavar="N", help="of the optimizer (1000)")
    add("--batch_size", type=positive_int, default=4, metavar="N", help="pictures at a time on a device (4)")
    add("--gradient_accumulation", type=positive_int, default=1, metavar="N", help="such batches a step (1)")
    add("--full", action="store_true", help="train all weights of the UNet, not an adapter (LoRA)")
    add("--lora_rank", type=positive_int, metavar="N", help="of the adapter's matrices (16)")
    add("--lora_alpha", type=positive_int, metavar="N", help="the adapter counts alpha / rank times (rank)")
    add("--lora_layers", choices=LORA_LAYERS, help="which get an adapter (attention)")
    add(
        "--learning_rate",
        type=positive_float,
        metavar="X",
        help=f"({LORA_LEARNING_RATE:g}, with --full {FULL_LEARNING_RATE:g})",
    )
    add("--lr_schedule", choices=LR_SCHEDULES, default="constant", help="of the learning rate (constant)")
    add("--warmup_steps", type=non_negative_int, default=0, metavar="N", help="over which it rises from 0 (0)")
    add("--weight_decay", type=non_negative_float, default=0.01, metavar="X", help="of AdamW (0.01)")
    add("--max_norm", type=positive_float, default=1.0, metavar="X", help="to which gradients are cut (1)")
    add("--ema_decay", type=share, metavar="X", help="of the average of --ema (0.999)")
    add("--snr_gamma", type=positive_float, metavar="X", help="min-SNR weights of errors; the paper takes 5 (none)")
    add("--noise_offset", type=finite_float, default=0.0, metavar="X", help="noise in whole channels; 0.05 to 0.1 (0)")
    add("--prediction_type", choices=PREDICTIONS, help="(what the model's scheduler says)")
    add("--seed", type=non_negative_int, default=0, metavar="N", help="(0)")


def add_speed_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("where, how fast and in how much memory").add_argument
    add("--device", metavar="NAME", help="npu, cuda or cpu, or one of several as npu:1 (the best there is)")
    add("--dtype", choices=DTYPES, help="of products; trained weights are float32 (the device's best)")
    add("--preset", choices=TRAINING_PRESETS, default="balanced", help="which of the following are on (balanced)")
    for name, help in SWITCHES.items():
        on = ", ".join(preset for preset, switches in TRAINING_PRESETS.items() if name in switches)
        add(f"--{name}", action=argparse.BooleanOptionalAction, help=f"{help} (in {on})")


def add_output_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=file_path, default=Path("outputs/training"), metavar="DIR", help="(outputs/training)")
    add("--cache_dir", type=file_path, metavar="DIR", help="of latents and text embeddings (cache in --output_dir)")
    add("--checkpoint_every", type=positive_int, default=500, metavar="N", help="steps (500)")
    add("--keep_checkpoints", type=positive_int, default=3, metavar="N", help="the last ones that stay (3)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output_dir, if there is one")
    add("--log_every", type=positive_int, default=10, metavar="N", help="steps between waits for the loss (10)")
    add(
        "--validation_prompt",
        type=text,
        action="append",
        default=[],
        metavar="TEXT",
        help="drawn while training; repeat it for a sheet of several",
    )
    add("--validation_every", type=positive_int, metavar="N", help="steps, and at the end (500)")
    add("--validation_steps", type=positive_int, metavar="N", help="denoising steps (30)")
    add(
        "--guidance_scale",
        type=finite_float,
        metavar="G",
        help=f"of these pictures (what {DEFAULTS} in the model's folder says, else {GUIDANCE_SCALE})",
    )


def non_negative_float(argument: str) -> float:
    number = finite_float(argument)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {argument}")
    return number


def share(argument: str) -> float:
    number = finite_float(argument)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, not {argument}")
    return number
