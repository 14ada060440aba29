"""What the pictures show: prompts as they are, or read by compel, with weights and of any length."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from runners.cli import UserError
from runners.report import Report
from runners.weight_files import first_line

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from runners.stable_diffusion.encoded_prompts import EncodedPrompts


def check_prompts(args: argparse.Namespace, prompts: Iterable[str]) -> None:
    """Parse what --prompt_weights has to read, before anything is loaded.

    Raises:
        UserError: compel is not installed, or cannot read a prompt, or would leave a part of it out.
    """
    if not args.prompt_weights:
        return
    try:
        from compel import Compel
        from compel.prompt_parser import Blend
    except ImportError as error:
        raise UserError(
            f"--prompt_weights needs compel ({error}); run: pip install -r requirements-prompts.txt"
        ) from error
    for prompt in prompts:
        try:
            read = Compel.parse_prompt_string(prompt)
        except Exception as error:  # of any kind: the text is the user's, and compel has no class of its own
            raise UserError(f"--prompt_weights: compel cannot read '{prompt}': {first_line(error)}") from error
        if prompt.strip() and not read.prompts:
            raise UserError(f"--prompt_weights: '{prompt}' has no words")
        if any(isinstance(part, Blend) and part.normalize_weights and not sum(part.weights) for part in read.prompts):
            raise UserError(
                f"--prompt_weights: the weights of .blend() in '{prompt}' sum to 0: add no_normalize to them"
            )
        if other := re.search(r"\([^()]*:\d+(\.\d+)?\)", prompt):
            raise UserError(
                f"--prompt_weights: '{other[0]}' is no weight to compel: write (word)1.3 instead of (word:1.3)"
            )
        if any(getattr(part, "wants_cross_attention_control", False) for part in read.prompts):
            raise UserError(f"--prompt_weights: '{prompt}' uses .swap(), which compel reads and does not carry out")
        if read.lora_weights:
            raise UserError(f"--prompt_weights: '{prompt}' names an adapter: give it by --lora")


def text_arguments(
    pipe: StableDiffusionPipeline, args: argparse.Namespace, prompt: str, encoded: EncodedPrompts | None = None
) -> dict[str, Any]:
    """What a call of the pipeline takes of `prompt` and of the negative prompt, by way of `encoded` if given."""
    if not args.prompt_weights:
        if encoded is None:
            return {"prompt": prompt, "negative_prompt": args.negative_prompt}
        embeds = {"prompt_embeds": encoded.encode(prompt)}
        if args.guidance_scale > 1:
            embeds["negative_prompt_embeds"] = encoded.encode(args.negative_prompt)
        return embeds
    from compel import CompelForSD

    with torch.no_grad():
        read = CompelForSD(pipe)(prompt, args.negative_prompt if args.guidance_scale > 1 else None)
    return {"prompt_embeds": read.embeds, "negative_prompt_embeds": read.negative_embeds}


def warn_of_long_prompts(
    pipe: StableDiffusionPipeline, args: argparse.Namespace, prompts: Iterable[str], report: Report
) -> None:
    if args.prompt_weights:  # they are read in pieces of the limit
        return
    limit = pipe.tokenizer.model_max_length
    for prompt in prompts:
        length = len(pipe.tokenizer(prompt).input_ids)
        if length > limit:
            report.warn(
                f"a prompt of {length} tokens is cut after {limit}, with --prompt_weights it is not: "
                f"'{prompt[:60]}...'"
            )
