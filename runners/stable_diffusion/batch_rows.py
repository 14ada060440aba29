"""The rows of a file of prompts, and the picture that each asks for: what generate_batch.py draws."""

import argparse
import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runners.cli import UserError
from runners.stable_diffusion.arguments import MAX_SEED
from runners.stable_diffusion.row_adapters import AdapterFiles, content_of

PAINTERS = ("torch", "torch_npu", "diffusers", "transformers")  # whose versions can change a picture
COLUMNS = ("prompt", "id", "seed", "negative_prompt", "lora")
MAX_NAME_BYTES = 128  # of an id, which becomes a file's name with more around it


class BadRow(ValueError):
    """A row that no picture can be made of; the message says why."""


@dataclass(frozen=True)
class Picture:
    """One picture to draw. `digest` is of all that decides what it looks like, `name` that of its files.

    `lora` is what `AdapterFiles.read` makes of the row's.
    """

    name: str
    digest: str
    prompt: str
    negative_prompt: str
    seed: int
    place: str  # in the file of prompts
    lora: str = ""

    def __str__(self) -> str:
        return f"{self.place} ({self.name})"


@dataclass(frozen=True)
class Failure:
    """A row without a picture, and why."""

    row: str
    reason: str


def read_records(path: Path) -> list[tuple[str, Any]]:
    """Each row of `path` with its place there. Of a line that is no JSON it is the ValueError that says so."""
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"--prompts {path} must be a .jsonl or a .parquet file")
    try:
        records = read_jsonl(path) if path.suffix == ".jsonl" else read_parquet(path)
    except OSError as error:
        raise UserError(f"--prompts {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    if not records:
        raise UserError(f"--prompts {path} holds no row")
    return records


def read_jsonl(path: Path) -> list[tuple[str, Any]]:
    def load(line: str) -> Any:
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            return ValueError(f"is not JSON: {error}")

    lines = enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1)
    return [(f"line {number}", load(line)) for number, line in lines if line.strip()]


def read_parquet(path: Path) -> list[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise not_installed("Parquet files need pyarrow, which", error) from error
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"--prompts {path} is not a Parquet file: {error}") from error
    return [(f"row {number}", row) for number, row in enumerate(rows, start=1)]


def make_picture(
    record: Any,
    number: int,
    place: str,
    args: argparse.Namespace,
    appearance: dict[str, Any],
    files: AdapterFiles,
) -> Picture:
    """The picture of row `number`, counted from 0. Raises BadRow."""
    if isinstance(record, ValueError):
        raise BadRow(str(record))
    if not isinstance(record, dict):
        raise BadRow('must be an object as {"prompt": "..."}')
    prompt = text_of(record, "prompt")
    if prompt is None or not prompt.strip():
        raise BadRow("prompt is empty" if "prompt" in record else "has no prompt")
    negative_prompt = text_of(record, "negative_prompt")
    if negative_prompt is None:
        negative_prompt = args.negative_prompt
    seed = record.get("seed")
    if seed is None:
        seed = args.seed + number
    elif isinstance(seed, float) and seed.is_integer():
        seed = int(seed)  # what Parquet makes of a column where some are missing
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED:
        raise BadRow(f"seed must be a whole number from 0 to {MAX_SEED}, not {seed!r}")
    content = {"prompt": prompt, "negative_prompt": negative_prompt, "seed": seed} | appearance
    lora = ""
    adapters = args.row_lora if record.get("lora") is None else record["lora"]
    if adapters is not None:
        try:
            lora = files.read(adapters)
        except ValueError as error:
            raise BadRow(str(error)) from error
    if lora:
        content["lora"] = content_of(lora)
    digest = digest_of(content)
    name = digest if record.get("id") is None else name_of(record["id"])
    return Picture(name, digest, prompt, negative_prompt, seed, place, lora)


def text_of(record: dict[str, Any], column: str) -> str | None:
    text = record.get(column)
    if text is not None and not isinstance(text, str):
        raise BadRow(f"{column} must be text, not {text!r:.40}")
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{column} is not valid Unicode: {error.reason}") from None
    return text


def name_of(id_: object) -> str:
    """An id as the name of a file."""
    if isinstance(id_, bool) or not isinstance(id_, str | int):
        raise BadRow(f"id must be text or a whole number, not {id_!r:.40}")
    name = str(id_)
    if not re.fullmatch(r"\w[\w.+=@-]*", name) or len(name.encode()) > MAX_NAME_BYTES:
        raise BadRow(
            f"id {name!r:.40} must begin with a letter or digit, have only such and _ . + = @ - in it, and be "
            f"{MAX_NAME_BYTES} bytes at most: it names the picture's files"
        )
    return name


def digest_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def appearance_of(args: argparse.Namespace, kind: str) -> dict[str, Any]:
    """All but prompts and seed that decides what the pictures look like, on devices of type `kind`.

    The model counts by what is in its files: exchanged weights make new pictures, another folder does not. Versions of
    torch and diffusers do not count, so that an update does not begin a long run anew; see `drawn_otherwise`.
    """
    names = (
        "steps",
        "guidance_scale",
        "height",
        "width",
        "scheduler",
        "dtype",
        "FA",
        "kernels",
        "TOME",
        "cache",
        "dynamo",
    )
    appearance = {name: getattr(args, name) for name in names}
    if args.prompt_weights:
        appearance["prompt_weights"] = True
    return appearance | {
        "model": args.model_digest,
        "device": kind,
        "threads": args.threads if kind == "cpu" else None,
    }


def plan(
    records: Sequence[tuple[str, Any]], args: argparse.Namespace, kind: str
) -> tuple[list[Picture], list[Failure]]:
    """The pictures of all good rows, and the bad rows. Raises UserError where two rows make one picture."""
    appearance = appearance_of(args, kind)
    files = AdapterFiles(args.prompts.parent)
    pictures: dict[str, Picture] = {}
    failures = []
    for number, (place, record) in enumerate(records):
        try:
            picture = make_picture(record, number, place, args, appearance, files)
        except BadRow as error:
            failures.append(Failure(place, str(error)))
            continue
        other = pictures.setdefault(picture.name, picture)
        if other is not picture:
            rows = f"--prompts {args.prompts}: {other.place} and {place}"
            if picture.name == picture.digest:
                raise UserError(f"{rows} are the same picture; give one an id or another seed, or leave one out")
            raise UserError(f"{rows} have the same id '{picture.name}'")
    return list(pictures.values()), failures


def drawn_otherwise(pictures: Sequence[Picture], folder: Path, now: dict[str, str | None]) -> dict[str, int]:
    """How many of the complete `pictures` each other version drew, where it may show in them."""
    counts: dict[str, int] = {}
    for picture in pictures:
        then = json.loads((folder / f"{picture.name}.json").read_text(encoding="utf-8")).get("versions", {})
        others = [f"{name} {then.get(name)}" for name in PAINTERS if then.get(name) != now[name]]
        if others:
            key = ", ".join(others)
            counts[key] = counts.get(key, 0) + 1
    return counts


def unused_columns(records: Sequence[tuple[str, Any]]) -> list[str]:
    found = {column: None for _, record in records if isinstance(record, dict) for column in record}
    return [column for column in found if column not in COLUMNS]


def is_complete(picture: Picture, folder: Path) -> bool:
    """Whether `folder` has the whole picture. Raises UserError when it has another one of that name."""
    try:
        about = json.loads((folder / f"{picture.name}.json").read_text(encoding="utf-8"))
        digest, size = about["digest"], about["bytes"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
    if digest != picture.digest:
        raise UserError(
            f"{picture.place}: {folder} has a picture '{picture.name}' of another prompt, seed, model or setting; "
            "take another --output_dir, or delete it"
        )
    with suppress(FileNotFoundError):
        return (folder / f"{picture.name}.png").stat().st_size == size
    return False


def not_installed(what: str, error: ImportError) -> UserError:
    return UserError(f"{what} is not installed ({error}); run: bash scripts/setup_env.sh --batch")
