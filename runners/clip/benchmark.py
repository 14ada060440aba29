"""How fast a CLIP is on each device, backend and precision of this machine, and how exact.

result = PerformanceBenchmark("examples/clip/demo_model").run_comparison("photo.jpg", ["a cat", "a dog"])
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ascend.device import DeviceError, get_all_devices, get_device_info, inference_dtypes
from runners.cli import UserError
from runners.clip.arguments import MODEL
from runners.clip.inputs import open_rgb, prepare_pictures, prepare_texts
from runners.clip.service import MIB, TORCH, CLIPInferenceService
from runners.clip.timing import measure, statistics
from runners.devices import DTYPES
from runners.files import write_json
from runners.offline.export import PACKAGES
from runners.offline.folder import OM, ONNX
from runners.report import format_table, versions

ROOT = Path(__file__).resolve().parents[2]
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
COLUMNS = 80
EMULATOR = "CANN_EMULATOR_SOC"  # which `python -m emulator run` sets
CHECKED = 16  # pictures that accuracy is counted over: the given one, and parts of it


@dataclass(frozen=True)
class Configuration:
    """One row of the comparison.

    Attributes:
        device: "npu", "cuda" or "cpu".
        dtype: a name of `runners.devices.DTYPES`; of an exported model what it was converted to is what counts.
        backend: "torch", "onnx" or "om".
        model: the folder or name of its model.
    """

    device: str
    dtype: str
    backend: str
    model: str

    @property
    def name(self) -> str:
        """`<device>_<fp32|fp16|bf16>`, and of exported models `<device>_<onnx|om>`."""
        return f"{self.device}_{SHORT[self.dtype] if self.backend == TORCH else self.backend}"

    def open(self) -> CLIPInferenceService:
        if self.backend == TORCH:
            return CLIPInferenceService(self.model, self.device, dtype=DTYPES[self.dtype])
        return CLIPInferenceService(self.model, self.device, backend=self.backend)


@dataclass(frozen=True)
class Task:
    """What is timed."""

    image: Path
    texts: tuple[str, ...]
    runs: int
    warmup: int
    batch_sizes: tuple[int, ...] = ()


def pictures_to_check(image: Path) -> list[Any]:
    """CHECKED pictures of the one: itself, and parts of it, which a model tells apart."""
    whole = open_rgb(image)
    width, height = whole.size
    parts = [whole]
    for number in range(1, CHECKED):
        share, left, top = 1 - number / (2 * CHECKED), number % 4 / 4, number % 3 / 2
        size = max(int(width * share), 1), max(int(height * share), 1)
        corner = int((width - size[0]) * left), int((height - size[1]) * top)
        parts.append(whole.crop((*corner, corner[0] + size[0], corner[1] + size[1])))
    return parts


def logits_and_features(service: CLIPInferenceService, task: Task) -> tuple[Tensor, Tensor]:
    """On the CPU: [pictures, texts], and normalised [pictures, width]."""
    features = service.extract_image_features(pictures_to_check(task.image))
    texts = service.extract_text_features(task.texts)
    return service.scoring.logits(features, texts).cpu(), features.cpu()


def accuracy(service: CLIPInferenceService, task: Task, reference: tuple[Tensor, Tensor]) -> dict[str, float]:
    """How far a service is from the CPU's float32 by the same pictures and texts.

    Returns:
        `max_logit_error`; the least `cosine` of a picture's features; `top1_agreement`, the share of pictures of
        which both find the same text best.
    """
    logits, features = logits_and_features(service, task)
    expected, expected_features = reference
    return {
        "max_logit_error": (logits - expected).abs().max().item(),
        "cosine": (features * expected_features).sum(dim=1).min().item(),
        "top1_agreement": (logits.argmax(dim=1) == expected.argmax(dim=1)).float().mean().item(),
    }


def measure_configuration(
    configuration: Configuration, task: Task, reference: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    """A row of the results.

    The first level is of the towers and the scores of one picture, as the original's; `end_to_end` also opens and
    prepares the picture and the texts; `batches` are of the image tower alone, by their size.
    """
    service = configuration.open()
    backend = service.backend
    pixels = prepare_pictures(service.processor, [task.image], backend.takes_bytes)
    tokens = prepare_texts(service.processor, task.texts, backend.text_length, backend.pads_texts).input_ids

    def model_only() -> Tensor:
        images, texts = backend.image_features(pixels), backend.text_features(tokens)
        return service.scoring.probabilities(service.scoring.logits(images, texts))

    if service.manager:
        service.manager.reset_peak_memory()
    seconds, first = measure(model_only, backend.synchronize, task.runs, task.warmup)
    row: dict[str, Any] = {
        "device": service.device,
        "backend": configuration.backend,
        "dtype": configuration.dtype if configuration.backend == TORCH else None,
        "fp16": configuration.dtype == "float16",
        "num_runs": task.runs,
        "first_ms": None if first is None else first * 1000,
        **statistics(seconds),
        **_memory(service),
    }
    row["end_to_end"] = service.benchmark(task.image, task.texts, task.runs, task.warmup)
    row["batches"] = {}
    for size in task.batch_sizes:
        batch = pixels.expand(size, *pixels.shape[1:]).contiguous()
        seconds, _ = measure(lambda: backend.image_features(batch), backend.synchronize, task.runs, task.warmup)  # noqa: B023
        row["batches"][str(size)] = statistics(seconds, size)
    row["accuracy"] = accuracy(service, task, reference)
    if service.manager:
        row["environment"] = {name: str(value) for name, value in get_device_info(service.manager.device).items()}
    service.close()
    return row


def _memory(service: CLIPInferenceService) -> dict[str, float]:
    """In MiB, of an accelerator; the peak is since the run began."""
    if service.manager is None or service.manager.device.type == "cpu":
        return {}
    memory = service.manager.memory_stats()
    return {f"memory_{name}_mb": memory[name] / MIB for name in ("allocated", "reserved", "peak")}


def environment() -> dict[str, Any]:
    """Of this process: what results depend on beside the model."""
    return {
        "host": platform.node(),
        "machine": platform.machine(),
        "processor": platform.processor() or platform.machine(),
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "emulated": EMULATOR in os.environ,  # then no time is a chip's
        "versions": versions(PACKAGES),
    }


class PerformanceBenchmark:
    """Compares configurations of one model.

    Args:
        model_path: a folder or a name on the hub.
        exported: a folder that convert_to_om.py wrote of the same model, for the backends "onnx" and "om".

    Attributes:
        results: by the names of configurations.
        skipped: why others have none.
    """

    def __init__(self, model_path: str = MODEL, exported: str | None = None) -> None:
        self.model_path, self.exported = str(model_path), exported
        self.results: dict[str, dict[str, Any]] = {}
        self.skipped: dict[str, str] = {}
        self.task: Task | None = None
        self._reference: tuple[Task, tuple[Tensor, Tensor]] | None = None

    def reference(self, task: Task) -> tuple[Tensor, Tensor]:
        """Of the CPU in float32, computed once for pictures and texts."""
        asked = replace(task, runs=0, warmup=0, batch_sizes=())
        if self._reference is None or self._reference[0] != asked:
            service = CLIPInferenceService(self.model_path, "cpu")
            self._reference = asked, logits_and_features(service, task)
        return self._reference[1]

    def benchmark_device(
        self,
        device: str,
        image_path: str | Path,
        texts: Sequence[str],
        num_runs: int = 100,
        warmup_runs: int = 10,
        use_fp16: bool = False,
    ) -> dict[str, Any] | None:
        """The row of one device, by torch; None, and a line in `skipped`, where there is no such device."""
        dtype = "float16" if use_fp16 else "float32"
        task = Task(Path(image_path), tuple(texts), num_runs, warmup_runs)
        return self.measure(Configuration(device, dtype, TORCH, self.model_path), task)

    def measure(self, configuration: Configuration, task: Task) -> dict[str, Any] | None:
        """The row of one configuration, in this process."""
        try:
            row = measure_configuration(configuration, task, self.reference(task))
        except DeviceError as error:
            self._skip(configuration.name, str(error))
            return None
        self.task = task
        self.results[configuration.name] = row
        return row

    def _skip(self, name: str, reason: str) -> None:
        self.skipped[name] = reason
        print(f"warning: {name} is left out: {reason}", file=sys.stderr)

    def run_comparison(
        self,
        image_path: str | Path,
        texts: Sequence[str],
        devices: Sequence[str] | None = None,
        num_runs: int = 100,
        test_fp16: bool = True,
        warmup_runs: int = 10,
        batch_sizes: Sequence[int] = (),
        test_bf16: bool = False,
    ) -> dict[str, dict[str, Any]]:
        """The rows of all `devices`, each measured in a process of its own, where nothing is left of another's.

        Devices that no torch can have together, as NPU and CUDA, are measured by different environments: `merge`.

        Args:
            devices: every one of "npu", "cuda" and "cpu" that is there, if None.
            test_fp16, test_bf16: measure these precisions, too, on devices that compute in them; on the CPU neither.
        """
        task = Task(Path(image_path), tuple(texts), num_runs, warmup_runs, tuple(batch_sizes))
        found = list(dict.fromkeys(device.type for device in get_all_devices()))
        for device in found if devices is None else devices:
            if device not in found:
                absent = Configuration(device, "float32", TORCH, self.model_path)
                self._skip(absent.name, f"there is no {device} here")
                continue
            for configuration in self.configurations(device, test_fp16, test_bf16):
                self._measure_apart(configuration, task)
        if not self.results:
            raise UserError(f"nothing could be measured: {'; '.join(self.skipped.values())}")
        return self.results

    def configurations(self, device: str, test_fp16: bool, test_bf16: bool) -> list[Configuration]:
        dtypes = ["float32"]
        if device != "cpu":
            able = inference_dtypes(torch.device(device, 0))
            wanted = {"float16": test_fp16, "bfloat16": test_bf16}
            dtypes += [name for name, asked in wanted.items() if asked and DTYPES[name] in able]
        found = [Configuration(device, dtype, TORCH, self.model_path) for dtype in dtypes]
        if self.exported:
            backends = [ONNX] if device != "npu" else [ONNX, OM]
            found += [Configuration(device, "float32", backend, self.exported) for backend in backends]
        return found

    def _measure_apart(self, configuration: Configuration, task: Task) -> None:
        """`measure` in a process of its own."""
        with tempfile.TemporaryDirectory() as name:
            order, answer = Path(name, "order.json"), Path(name, "answer.json")
            task_fields = {**asdict(task), "image": str(task.image.absolute())}
            write_json(order, {"model": self.model_path, "configuration": asdict(configuration), "task": task_fields})
            command = [sys.executable, "-m", "runners.clip.benchmark", str(order), str(answer)]
            path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            variables = {**os.environ, "PYTHONPATH": path}
            done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
            if done.returncode or not answer.exists():
                last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
                self._skip(configuration.name, last.removeprefix("error: "))
                return
            content = json.loads(answer.read_text(encoding="utf-8"))
        self.task = task
        self.results |= content["results"]
        for name, reason in content["skipped"].items():
            self._skip(name, reason)

    def print_comparison_table(self) -> None:
        """The fastest first; `relative` is its time as a share of each."""
        print("=" * COLUMNS)
        print(comparison_table(self.results))
        print("=" * COLUMNS)

    def report(self) -> dict[str, Any]:
        """What `save_results` writes: a row for each configuration, and beside them `environment` and `settings`."""
        assert self.task is not None
        settings = {**asdict(self.task), "image": str(self.task.image), "model": self.model_path}
        return {
            **self.results,
            "environment": environment(),
            "settings": {**settings, "exported": self.exported, "skipped": self.skipped},
        }

    def save_results(self, path: str | Path) -> None:
        write_json(Path(path), self.report())


def rows_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The configurations in what `save_results` wrote."""
    return {name: row for name, row in report.items() if isinstance(row, dict) and "mean_ms" in row}


def merge(reports: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The rows of several results, as of environments whose devices exclude each other.

    Raises:
        UserError: a file is none of `save_results`, they are of other models or texts, or two have the same row.
    """
    merged: dict[str, dict[str, Any]] = {}
    asked: set[str] = set()
    for path in reports:
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            asked.add(json.dumps([report["settings"][name] for name in ("model", "texts")]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no result of benchmark.py: {error}") from error
        for name, row in rows_of(report).items():
            if name in merged:
                raise UserError(f"{path} has {name}, as another file has: which one counts?")
            merged[name] = {**row, "environment": report["environment"] | row.get("environment", {})}
    if len(asked) > 1:
        raise UserError(f"these results are of different models or texts: {', '.join(sorted(asked))}")
    return merged


def comparison_table(results: dict[str, dict[str, Any]]) -> str:
    rows = sorted(results.items(), key=lambda item: item[1]["mean_ms"])
    fastest = rows[0][1]["mean_ms"]
    numbers = [
        (
            name,
            [
                row["mean_ms"],
                row["p95_ms"],
                row["throughput_per_sec"],
                row.get("memory_peak_mb"),
                100 * fastest / row["mean_ms"],
                row["accuracy"]["max_logit_error"],
                100 * row["accuracy"]["top1_agreement"],
            ],
            ".4g",
        )
        for name, row in rows
    ]
    return format_table(["mean ms", "p95 ms", "per s", "peak MiB", "relative %", "error", "agrees %"], numbers)


def _answer(order: Path, answer: Path) -> None:
    """What the process of `_measure_apart` does."""
    content = json.loads(order.read_text(encoding="utf-8"))
    task = content["task"]
    task |= {"image": Path(task["image"]), "texts": tuple(task["texts"]), "batch_sizes": tuple(task["batch_sizes"])}
    benchmark = PerformanceBenchmark(content["model"])
    benchmark.measure(Configuration(**content["configuration"]), Task(**task))
    write_json(answer, {"results": benchmark.results, "skipped": benchmark.skipped})


if __name__ == "__main__":
    from runners.cli import one_line_errors

    with one_line_errors():
        _answer(Path(sys.argv[1]), Path(sys.argv[2]))
