"""What generate_batch.py does: it plans the pictures of a file of prompts and has them drawn on Ray's workers."""

import argparse
import fcntl
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ascend.device import DEVICE_TYPES, find_device
from runners.checkpoint import check_model
from runners.cli import (
    FAILED,
    ArgumentParser,
    Terminated,
    UserError,
    fail,
    file_path,
    non_negative_int,
    one_line_errors,
    positive_int,
    sigterm_raises,
    text,
)
from runners.devices import DTYPES, add_memory_arguments
from runners.files import make_output_dir, remove_scratch
from runners.model_dir import require_patched_diffusers
from runners.ray_local import RAY_OPTIONS, RESOURCES, count_devices, quiet_ray, start_ray, worker_environment
from runners.report import Report, versions
from runners.stable_diffusion.adapters import check_loras
from runners.stable_diffusion.arguments import (
    DEMO_MODEL,
    add_acceleration_arguments,
    add_lora_argument,
    add_model_argument,
    add_step_and_size_arguments,
    complete,
)
from runners.stable_diffusion.batch_rows import (
    COLUMNS,
    Failure,
    Picture,
    appearance_of,
    drawn_otherwise,
    is_complete,
    not_installed,
    plan,
    read_records,
    unused_columns,
)
from runners.stable_diffusion.fast import describe_fast
from runners.stable_diffusion.painter import Painter
from runners.stable_diffusion.pipeline import choose_scheduler
from runners.stable_diffusion.prompts import check_prompts

MAX_BLOCKS = 2000  # tasks that Ray keeps track of; with more pictures, some share a task
MAX_LISTED = 20  # failures in the terminal; report.json has all


def parse_arguments(description: str | None, folder: Path, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Those of generate_batch.py in `folder`."""
    parser = ArgumentParser(
        prog="generate_batch.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("what to draw").add_argument
    add("--prompts", type=file_path, required=True, metavar="FILE", help=".jsonl or .parquet, see above")
    add_model_argument(add, folder / DEMO_MODEL)
    parser.set_defaults(image=None, mask=None, strength=None, lora=[])
    add(
        "--negative_prompt",
        type=text,
        default="",
        metavar="TEXT",
        help="what pictures should not show, where a row says nothing",
    )
    add_step_and_size_arguments(add)
    add_lora_argument(add, dest="row_lora")
    add(
        "--seed",
        type=non_negative_int,
        default=0,
        metavar="N",
        help="of the first row, the next has N+1 ..., where a row gives none (0)",
    )

    add = parser.add_argument_group("where to compute").add_argument
    add(
        "--device",
        type=device_type,
        default=os.environ.get("PREFERRED_DEVICE") or None,
        metavar="TYPE",
        help="npu, cuda or cpu (the best there is)",
    )
    add("--dtype", choices=DTYPES, help="(the device's best)")
    add_memory_arguments(add)
    add("--workers", type=positive_int, metavar="N", help="each with a device of its own (all devices; on the CPU 1)")
    add(
        "--threads",
        type=positive_int,
        default=1,
        metavar="N",
        help="CPU threads of each worker; on the CPU another number can change a picture's last bits (1)",
    )
    add(
        "--address",
        default=os.environ.get("RAY_ADDRESS") or None,
        metavar="HOST:PORT",
        help="of a Ray cluster, or auto for that of this machine ($RAY_ADDRESS, else one is started here)",
    )
    add(
        "--retries",
        type=non_negative_int,
        default=3,
        metavar="N",
        help="how often a picture is begun again after its worker died (3)",
    )

    add_acceleration_arguments(parser)

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=file_path, default=Path("outputs/batch"), metavar="DIR", help="(outputs/batch)")

    args = parser.parse_args(arguments)
    complete(args)
    check_loras(args.row_lora)
    args.row_lora = [f"{path.absolute()}:{scale}" for path, scale in args.row_lora]
    args.num_images, args.warmup = 1, 0  # which run_sd's functions ask for
    args.model_path, args.output_dir = args.model_path.absolute(), args.output_dir.absolute()
    args.config = args.config and args.config.absolute()
    return args


def device_type(text: str) -> str:
    if text not in DEVICE_TYPES:
        hint = "; Ray gives each worker one of its own" if text.partition(":")[0] in DEVICE_TYPES else ""
        raise argparse.ArgumentTypeError(f"must be npu, cuda or cpu, not '{text}'{hint}")
    return text


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of `folder`, and remove what killed ones left half written."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing to {folder.parent}; wait for it or take another one") from None
        except OSError:
            pass  # a file system without locks
        remove_scratch(folder)
        yield
        remove_scratch(folder)  # of workers that died on the way


def import_ray() -> Any:
    quiet_ray()
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise not_installed("Ray Data", error) from error
    return ray


def find_workers(ray: Any, args: argparse.Namespace) -> tuple[str, int]:
    """Type of the devices and number of workers: in the cluster, which this connects to, else on this machine."""
    if args.address:
        try:
            ray.init(args.address, runtime_env={"env_vars": worker_environment()}, **RAY_OPTIONS)
        except (ConnectionError, RuntimeError, ValueError) as error:
            hint = "if it is there and wants a token, set RAY_AUTH_MODE=token"
            raise UserError(f"--address {args.address}: {error}; {hint}") from error
        return choose_workers(args, ray.cluster_resources())
    kind = find_device(args.device).type
    devices = count_devices(kind)
    if kind != "cpu" and (args.workers or 0) > devices:
        raise UserError(f"--workers {args.workers} are more than this machine's devices: {devices} of type {kind}")
    return kind, args.workers or devices


def choose_workers(args: argparse.Namespace, resources: dict[str, float]) -> tuple[str, int]:
    """Type of the devices and number of workers in a cluster with `resources`."""
    kind = args.device or next((kind for kind in DEVICE_TYPES if resources.get(RESOURCES[kind])), "cpu")
    devices = 1 if kind == "cpu" else int(resources.get(RESOURCES[kind], 0))
    if not args.workers and not devices:
        raise UserError(f"--device {kind}: the cluster has none now; with --workers N the run waits for them")
    return kind, args.workers or devices


def draw_on_workers(
    ray: Any, pictures: Sequence[Picture], args: argparse.Namespace, kind: str, workers: int
) -> Iterator[dict[str, str]]:
    """What came of each picture, as they get ready."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.max_errored_blocks = -1  # what Ray loses does not end the run
    context.max_consecutive_actor_init_deaths = args.retries  # of workers killed while they load
    context.execution_no_progress_timeout_s = -1  # a graph may compile for longer than any limit
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    dataset = ray.data.from_items(
        [asdict(picture) for picture in pictures], override_num_blocks=min(len(pictures), MAX_BLOCKS)
    ).map(
        Painter,
        fn_constructor_args=(args, kind),
        # One task in flight: pictures that take long are not queued at a worker while another has nothing to do.
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(pictures)), max_tasks_in_flight_per_actor=1),
        num_cpus=args.threads,
        num_gpus=1 if kind == "cuda" else None,
        resources={"NPU": 1} if kind == "npu" else None,
    )
    try:
        for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
            columns = list(batch)
            yield from (dict(zip(columns, values, strict=True)) for values in zip(*batch.values(), strict=True))
    except ray.exceptions.RayError as error:
        fail(f"Ray: {str(error).strip().splitlines()[-1]} (its logs have more)", FAILED)


def draw_all(
    ray: Any, pictures: Sequence[Picture], there: int, args: argparse.Namespace, kind: str, workers: int
) -> tuple[list[Failure], list[str]]:
    """Draw `pictures` under a progress bar that begins at `there`. The result is failures and warnings."""
    waiting = {picture.name: picture for picture in pictures}
    failures: list[Failure] = []
    warnings: list[str] = []
    with tqdm(total=there + len(waiting), initial=there, unit="image", dynamic_ncols=True) as bar:
        while waiting:  # again where Ray lost something, unless it lost all
            before = len(waiting)
            for outcome in draw_on_workers(ray, list(waiting.values()), args, kind, workers):
                if outcome["refusal"]:
                    raise UserError(outcome["refusal"])
                row = str(waiting.pop(outcome["name"]))
                if outcome["error"]:
                    failures.append(Failure(row, outcome["error"]))
                    bar.set_postfix(failed=len(failures))
                    continue
                if outcome["warning"]:
                    warnings.append(f"{row}: {outcome['warning']}")
                bar.update()
            if len(waiting) == before:
                break
    return failures + [Failure(str(picture), "Ray lost it") for picture in waiting.values()], warnings


def run(args: argparse.Namespace) -> None:
    require_patched_diffusers()
    records = read_records(args.prompts)
    model = check_model(args.model_path, args.config)
    check_prompts(args, [args.negative_prompt])
    choose_scheduler(args, model)  # what is wrong with the steps is said before Ray starts
    if args.fast_row:
        print(describe_fast(args), flush=True)
    ray = import_ray()
    report = Report()
    columns = unused_columns(records)
    if columns:
        report.warn(f"--prompts {args.prompts}: not used: {', '.join(columns)[:200]}; known are {', '.join(COLUMNS)}")
    if args.guidance_scale <= 1 and any(isinstance(row, dict) and row.get("negative_prompt") for _, row in records):
        report.warn(f"negative prompts have no effect: --guidance_scale {args.guidance_scale:g} turns guidance off")
    images = make_output_dir(args.output_dir / "images")
    args.model_digest = model.digest()
    pictures: list[Picture] = []
    try:
        kind, workers = find_workers(ray, args)
        with locked(images):
            pictures, bad_rows = plan(records, args, kind)
            complete_ones = [picture for picture in pictures if is_complete(picture, images)]
            for others, count in drawn_otherwise(complete_ones, images, versions()).items():
                report.warn(f"{count} pictures that are there were drawn by {others}; delete them to draw them again")
            names = {picture.name for picture in complete_ones}
            waiting = [picture for picture in pictures if picture.name not in names]
            if waiting and not args.address:
                start_ray(ray, kind, workers * args.threads)
            start = time.perf_counter()
            with sigterm_raises():  # once more: Ray has taken the signal over
                lost, warnings = draw_all(ray, waiting, len(names), args, kind, workers)
            seconds = time.perf_counter() - start
    except (KeyboardInterrupt, Terminated):
        count = sum(is_complete(picture, images) for picture in pictures)
        print(f"{count} of {len(pictures)} pictures are in {images}; the same command goes on from there")
        raise
    finally:
        ray.shutdown()

    drawn, failures = len(waiting) - len(lost), bad_rows + lost
    report.warnings += warnings
    report.sections = {
        "settings": appearance_of(args, kind)
        | {"model_path": str(args.model_path), "prompts": str(args.prompts), "workers": workers},
        "fast": args.fast_row,
        "images": {"drawn": drawn, "already_there": len(names), "failed": len(failures)},
        "seconds": seconds,
        "failures": [asdict(failure) for failure in failures],
    }
    report.write(args.output_dir / "report.json")
    list_at_most(f"{len(warnings)} pictures with warnings", warnings)
    list_at_most(
        f"{len(failures)} rows without a picture", [f"{failure.row}: {failure.reason}" for failure in failures]
    )
    print(
        f"{drawn} pictures drawn in {seconds:.1f} s ({drawn / seconds:.2f} images/s) by {workers} workers on {kind}, "
        f"{len(names)} were there, {len(failures)} failed; they are in {images}"
    )
    if failures:
        fail(f"{len(failures)} pictures are missing; the same command tries them again", FAILED)


def list_at_most(heading: str, lines: Sequence[str]) -> None:
    if lines:
        more = [f"... and {len(lines) - MAX_LISTED} more in report.json"] if len(lines) > MAX_LISTED else []
        print(f"{heading}:", *lines[:MAX_LISTED], *more, sep="\n  ", file=sys.stderr)


def main(description: str | None, folder: Path, arguments: Sequence[str] | None = None) -> None:
    """Run the command line of the program that `description` describes, in `folder`, beside its demo model."""
    with one_line_errors():
        run(parse_arguments(description, folder, arguments))
