"""The same training under Ray Train, for clusters that have Ray: each worker is a rank with a device of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ascend.device import find_device
from runners.cli import FAILED, UserError, fail, one_line_errors, positive_int
from runners.files import make_output_dir
from runners.ray_local import RAY_OPTIONS, RESOURCES, quiet_ray, start_ray, worker_environment
from runners.training.arguments import make_parser, settings_of
from runners.training.settings import Settings

BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}
BAD_SETTINGS = "bad settings: "  # begins what a worker says of an error that is the user's to mend


def run_worker(config: dict[str, Any]) -> None:
    """What Ray starts as each rank; torch's process group is there already."""
    from ascend.device import DeviceError
    from runners.training.run import train

    if config["kind"] != "cpu":
        os.environ["LOCAL_RANK"] = "0"  # Ray shows a worker its own device alone
    try:
        train(config["settings"])
    except (UserError, DeviceError) as error:
        raise RuntimeError(f"{BAD_SETTINGS}{error}") from None  # Ray's workers have no other words


def train_on_ray(settings: Settings, workers: int, address: str | None) -> None:
    """Train on `workers` ranks of the cluster at `address`, or of one that is started on this machine.

    Raises:
        UserError: Ray is not installed, or a worker found the settings wrong.
    """
    quiet_ray()
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    try:
        import ray
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise UserError(f"Ray Train is not installed ({error}): pip install -r requirements-training.txt") from error
    kind = find_device(settings.device).type
    output = make_output_dir(settings.output_dir).absolute()
    absolute = {name: getattr(settings, name).absolute() for name in ("data", "model_path", "cache_dir")}
    settings = replace(settings, output_dir=output, **absolute)
    if address:
        ray.init(address, runtime_env={"env_vars": worker_environment()}, **RAY_OPTIONS)
    else:
        start_ray(ray, kind, workers)
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={"settings": settings, "kind": kind},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=kind == "cuda",
            resources_per_worker={"CPU": 1} | ({RESOURCES[kind]: 1} if kind != "cpu" else {}),
        ),
        torch_config=TorchConfig(backend=BACKENDS[kind]),
        run_config=RunConfig(name="ray", storage_path=str(output)),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        refusal = next((line.split(BAD_SETTINGS, 1)[1] for line in lines if BAD_SETTINGS in line), None)
        if refusal:
            raise UserError(refusal) from error
        fail(f"the training failed on a worker: {lines[-1]}", FAILED)
    finally:
        ray.shutdown()


def main(description: str | None, folder: Path, arguments: Sequence[str] | None = None) -> None:
    """Run the command line of train_on_ray.py in `folder`."""
    with one_line_errors():
        parser = make_parser("train_on_ray.py", description, folder)
        add = parser.add_argument_group("Ray").add_argument
        add("--workers", type=positive_int, default=2, metavar="N", help="ranks, each with a device of its own (2)")
        add("--address", metavar="HOST:PORT", help="of a Ray cluster, or auto (one is started on this machine)")
        args = vars(parser.parse_args(arguments))
        workers, address = args.pop("workers"), args.pop("address")
        train_on_ray(settings_of(args), workers, address)
