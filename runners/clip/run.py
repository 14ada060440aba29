"""What pytorch_npu_inference.py does: it says of pictures which text describes each best."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from runners.cli import FAILED, UserError, fail, one_line_errors
from runners.clip.arguments import parse_arguments
from runners.clip.service import CLIPInferenceService, EncodedTexts
from runners.devices import DTYPES, check_compiler
from runners.files import make_output_dir, write_atomically
from runners.images import PICTURES
from runners.report import format_table

BENCHMARK_RUNS = 100


@dataclass(frozen=True)
class Row:
    """A picture, and the texts it may be described by."""

    image: Path
    texts: tuple[str, ...]


def list_rows(args: argparse.Namespace) -> list[Row]:
    """Of --image and --input. Raises UserError."""
    rows = [Row(path, tuple(args.texts)) for each in args.image or () for path in _pictures_in(each)]
    return rows + (_read_rows(args.input, args.texts) if args.input else [])


def _pictures_in(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError(f"--image {path} does not exist")
    if path.is_file():
        return [path]
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
    if not found:
        raise UserError(f"the folder --image {path} holds no picture ({', '.join(PICTURES)})")
    return found


def _read_rows(path: Path, texts: Sequence[str]) -> list[Row]:
    """The rows of a .jsonl file, in which paths count from its folder."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--input {path}: {getattr(error, 'strerror', None) or error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"--input {path}, line {number} is not JSON: {error}") from error
        if not isinstance(content, dict) or not isinstance(content.get("image"), str):
            raise UserError(f'--input {path}, line {number} names no image, as in {{"image": "a.png"}}')
        own = content.get("texts", list(texts))
        if not isinstance(own, list) or not own or not all(isinstance(each, str) and each.strip() for each in own):
            raise UserError(f"--input {path}, line {number}: texts must be a list of texts that are not empty")
        rows.append(Row(path.parent / content["image"], tuple(own)))
    if not rows:
        raise UserError(f"--input {path} has no row")
    return rows


def look_at(service: CLIPInferenceService, rows: Sequence[Row], batch_size: int) -> Iterator[dict[str, Any]]:
    """The result of each row in turn; of one whose picture cannot be read, the `error`."""
    for texts, same in groupby(rows, key=lambda row: row.texts):
        encoded = service.encode_texts(texts)
        group = list(same)
        for start in range(0, len(group), batch_size):
            part = group[start : start + batch_size]
            results = _try_all(service, [row.image for row in part], encoded)
            yield from ({"image": str(row.image), **result} for row, result in zip(part, results, strict=True))


def _try_all(service: CLIPInferenceService, images: Sequence[Path], texts: EncodedTexts) -> list[dict[str, Any]]:
    """Together; one by one where that fails, so that a bad picture stands for itself alone."""
    try:
        return service.batch_predict(images, texts, len(images))
    except UserError as error:
        if len(images) == 1:
            return [{"error": str(error)}]
    return [result for image in images for result in _try_all(service, [image], texts)]


def run(args: argparse.Namespace) -> None:
    rows = list_rows(args)
    if args.output:
        make_output_dir(args.output.parent)
    service = CLIPInferenceService(
        args.model,
        args.device,
        use_fp16=args.fp16,
        dtype=DTYPES[args.dtype] if args.dtype else None,
        backend=args.backend,
        kernels=args.FA,
        compiled=args.dynamo,
    )
    if args.dynamo and service.manager:
        check_compiler(service.manager.device)
    results = []
    for result in look_at(service, rows, args.batch_size):
        results.append(result)
        if "error" in result:
            print(f"error: {result['error']}", file=sys.stderr)
        elif args.json:
            print(json.dumps(result, ensure_ascii=False), flush=True)
        else:
            print(describe(result), flush=True)
    if args.output:
        lines = [json.dumps(result, ensure_ascii=False) + "\n" for result in results]
        write_atomically(args.output, "".join(lines).encode())
    good = [row for row, result in zip(rows, results, strict=True) if "error" not in result]
    if args.benchmark and good:
        print_benchmark(service, good[0], args.json)
    service.close()
    if len(good) < len(rows):
        fail(f"{len(rows) - len(good)} of {len(rows)} pictures could not be read", FAILED)


def describe(result: dict[str, Any]) -> str:
    table = [
        (f"  {text}", [share], ".2%") for text, share in zip(result["texts"], result["probabilities"], strict=True)
    ]
    heading = f"{result['image']}: {result['best_match']} ({result['best_score']:.1%})"
    own = ", each by itself (sigmoid)" if result["scoring"] == "sigmoid" else ""
    table_text = format_table([""], table).partition("\n")[2]
    return f"{heading}\n{table_text}\n  {result['inference_time_ms']:.1f} ms on {result['device']}{own}"


def print_benchmark(service: CLIPInferenceService, row: Row, as_json: bool) -> None:
    timed = service.benchmark(row.image, row.texts, BENCHMARK_RUNS)
    if as_json:
        print(json.dumps({"benchmark": timed}))
        return
    numbers = [(name, [value], ".2f") for name, value in timed.items() if isinstance(value, float)]
    print(format_table([f"{BENCHMARK_RUNS} predictions"], numbers))
    doubtful = {"p95_ms", "p99_ms"} - {*timed["percentiles_trusted"]}
    if doubtful:
        print(f"too few samples lie beyond {', '.join(sorted(doubtful))} to rely on; benchmark.py takes more")


def main(program: str, description: str | None, arguments: Sequence[str] | None = None) -> None:
    """Run the command line of `program`, which `description` describes."""
    with one_line_errors():
        run(parse_arguments(program, description, arguments))
