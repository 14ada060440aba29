"""An instruction in the words that HiDream-E1 was trained on, by a language model that sees the picture.

Any endpoint that speaks OpenAI's chat completions will do: OPENAI_BASE_URL names it, OPENAI_API_KEY is its key.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import PIL.Image
from diffusers.pipelines.hidream_image.editing_images import to_rgb

from runners.cli import ArgumentParser, UserError, file_path, one_line_errors, text
from runners.hidream.arguments import E1_FULL, GPT
from runners.hidream.edits import Edit, open_picture

if TYPE_CHECKING:
    from openai import OpenAI

MOST_TOKENS, TEMPERATURE = 500, 0.2  # the original's, too
LARGEST_SIDE = 1024  # of what is sent; language models see no more
TRIES = 3  # of an answer in another form
RETRIES = 4  # of a request that failed, the first after half a second, each later one after twice as long
TIMEOUT = 120.0  # seconds
REQUEST = """\
You prepare requests for a model that edits pictures. You see a picture, and this is what somebody wants changed in it:

{instruction}

Answer with exactly three lines of plain English, without numbers, labels, quotation marks or empty lines:
first line: what the picture shows now, in one sentence;
second line: what to do, as one short imperative sentence that names the things in the picture it is about, and
asks for nothing that was not wanted;
third line: what the picture shows after the change, in one sentence, the same as the first except for the change."""


class RefinedInstruction(NamedTuple):
    """What the picture shows, what to change, and what it shows then; none of them is empty."""

    source_description: str
    instruction: str
    target_description: str

    @property
    def prompt(self) -> str:
        """As HiDream-E1-Full reads it."""
        instruction = self.instruction.removesuffix(".")
        return E1_FULL.prompt.format(instruction=instruction, description=self.target_description)


def refine_instruction(
    image: PIL.Image.Image, instruction: str, model: str = GPT, retries: int = RETRIES
) -> RefinedInstruction:
    """What `model` makes of `instruction` for `image`, which may be of any mode and size.

    Raises:
        UserError: the instruction is empty, the endpoint cannot be used, or never answered with three lines.
    """
    if not instruction.strip():
        raise UserError("the instruction is empty: say what to change")
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": as_data_url(image)}},
        {"type": "text", "text": REQUEST.format(instruction=instruction.strip())},
    ]
    check_endpoint()
    from openai import OpenAI

    client = OpenAI(max_retries=retries, timeout=TIMEOUT)
    for _ in range(TRIES):
        answer = _ask(client, model, content)
        lines = [line.strip() for line in answer.splitlines() if line.strip()]
        if len(lines) == len(RefinedInstruction._fields):
            return RefinedInstruction(*lines)
    raise UserError(
        f"{model} answered {TRIES} times with something else than three lines, at last {answer[:80]!r}: take another "
        "model, or leave the instruction as it is"
    )


def refine_edit(edit: Edit, model: str = GPT) -> Edit:
    """`edit` with its instruction refined, and with a description of the result, unless it has one.

    Raises:
        UserError: as for `refine_instruction`, or the picture cannot be read.
    """
    refined = refine_instruction(open_picture(edit.image), edit.instruction, model)
    description = edit.target_description or refined.target_description
    return replace(edit, instruction=refined.instruction, target_description=description)


def as_data_url(image: PIL.Image.Image) -> str:
    """As a JPEG of at most 1024 pixels a side."""
    small = to_rgb(image)
    small.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    data = io.BytesIO()
    small.save(data, format="jpeg", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def check_endpoint() -> None:
    """Raise UserError where no endpoint can be asked; whether it answers is seen then."""
    if importlib.util.find_spec("openai") is None:
        raise UserError("refining instructions needs openai: see examples/hidream_e1/requirements_npu.txt")
    if not os.environ.get("OPENAI_API_KEY"):
        raise UserError(
            "OPENAI_API_KEY is not set, which refining instructions sends to the endpoint that OPENAI_BASE_URL names; "
            "one that wants no key takes any"
        )


def _ask(client: OpenAI, model: str, content: list[dict[str, Any]]) -> str:
    """The text of the answer, which is empty where there is none."""
    from openai import APIConnectionError, APIError, APIStatusError
    from openai.types.chat import ChatCompletion

    try:
        answer: Any = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": content}],
            max_tokens=MOST_TOKENS,
            temperature=TEMPERATURE,
        )
    except APIConnectionError as error:
        raise UserError(
            f"cannot reach {client.base_url}: {error.__cause__ or error}; OPENAI_BASE_URL names the endpoint"
        ) from error
    except APIStatusError as error:
        raise UserError(f"{client.base_url} refused {model} with {error.status_code}: {error.message}") from error
    except (APIError, ValueError) as error:  # what is no JSON
        raise UserError(f"{client.base_url} does not speak OpenAI's chat completions: {error}") from error
    if not isinstance(answer, ChatCompletion):  # text as it came
        raise UserError(f"{client.base_url} does not speak OpenAI's chat completions: {str(answer)[:80]!r}")
    return (answer.choices[0].message.content or "") if answer.choices else ""


def main(description: str | None, arguments: Sequence[str] | None = None) -> None:
    """Run the command line of the program that `description` describes."""
    parser = ArgumentParser(description=description)
    add = parser.add_argument
    add("--src_image", type=file_path, required=True, metavar="FILE", help="the picture to edit")
    add("--src_instruction", type=text, required=True, metavar="TEXT", help="what to change in it")
    add("--model", type=text, default=GPT, metavar="NAME", help=f"of the endpoint ({GPT})")
    args = parser.parse_args(arguments)
    with one_line_errors():
        print(refine_instruction(open_picture(Path(args.src_image)), args.src_instruction, args.model).prompt)
