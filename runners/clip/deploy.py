"""What deploy.sh does: a CLIP becomes files that are checked against it, measured, and described in a report."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ascend.atc import AtcError, check_soc_version, find_atc
from ascend.device import find_device, get_chip, inference_dtypes
from runners.cli import FAILED, ArgumentParser, fail, file_path, positive_int, text
from runners.clip.benchmark import Configuration, PerformanceBenchmark, comparison_table, environment
from runners.clip.gate import CHOICES, LIMITS, Pairs, ask, compare
from runners.clip.service import TORCH, CLIPInferenceService
from runners.devices import DTYPES
from runners.files import make_output_dir, write_atomically, write_json
from runners.offline.converter import PROFILES, ModelConverter, convert_clip
from runners.offline.export import PACKAGES, require_packages
from runners.offline.folder import OM, ONNX
from runners.report import Report, format_table, versions

REPORT = "deploy_report"
RESULTS = "benchmark_results.json"
IMAGE = "test_image.png"
TEXTS = 3  # of the picture that is measured with


def parse_arguments(
    program: str, description: str | None, model: Path, arguments: Sequence[str] | None
) -> argparse.Namespace:
    parser = ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=text, default=str(model), metavar="DIR", help="a folder, or a name on the hub (the demo CLIP)")
    add(
        "--output-dir",
        type=file_path,
        default=Path("deployed_models"),
        metavar="DIR",
        help="of the files and reports (./deployed_models)",
    )
    add(
        "--soc-version",
        metavar="CHIP",
        help="as Ascend310P3, what `npu-smi info` shows with Ascend in front (this machine's)",
    )
    add("--batch-size", type=positive_int, default=1, metavar="N", help="inputs in a call of the files (1)")
    add("--dynamic-batch", action="store_true", help=f"profiles of {', '.join(map(str, PROFILES))} instead")
    add("--no-benchmark", action="store_true", help="leave the measuring out")
    add("--num-runs", type=positive_int, default=100, metavar="N", help="timed calls of each configuration (100)")
    add(
        "--scenes",
        type=positive_int,
        default=200,
        metavar="N",
        help="pictures by which files are compared with the model; 1000 takes some minutes (200)",
    )
    return parser.parse_args(arguments)


class Deployment:
    """The steps, each of which gives a section of the report or raises what is wrong.

    Args:
        pairs: by which the files are compared with the model.
    """

    def __init__(self, args: argparse.Namespace, pairs: Pairs) -> None:
        self.args, self.pairs, self.report = args, pairs, Report()
        self.device = find_device(None)
        self.chip = get_chip(self.device)
        self.converter: ModelConverter | None = None
        self.benchmark_table: str | None = None

    @property
    def runs_offline_models(self) -> bool:
        return self.converter is not None and self.converter.soc_version == self.chip

    def run(self) -> None:
        """All steps up to the first that fails; the report is written in either case."""
        steps: dict[str, Callable[[], dict[str, Any]]] = {
            "environment": self.check_environment,
            "conversion": self.convert,
            "accuracy": self.check_accuracy,
        }
        if not self.args.no_benchmark:
            steps["benchmark"] = self.measure
        make_output_dir(self.args.output_dir)
        self.report.sections = {"settings": {name: str(value) for name, value in vars(self.args).items()}}
        result = "did not end"
        try:
            for number, (name, step) in enumerate(steps.items(), start=1):
                print(f"[{number}/{len(steps)}] {name}", flush=True)
                result = f"failed in {name}"
                self.report.sections[name] = step()
            result = "deployed"
        except BaseException as error:
            result = f"{result}: {error}"
            raise
        finally:
            self.write(result)
        print(f"{result}; {REPORT}.md and {REPORT}.json are in {self.args.output_dir}")

    def check_environment(self) -> dict[str, Any]:
        """Sets the converter, where there can be one."""
        require_packages()
        target = self._target()
        self.converter = ModelConverter(target) if target else None
        found = {"device": str(self.device), "chip": self.chip, "offline models for": target, **environment()}
        if self.chip and found["emulated"]:
            self.report.warn("the chip is emulated: nothing here ran on a card, and no time is a chip's")
        if target and not self.runs_offline_models:
            self.report.warn(
                f"offline models are for {target}, and here is {self.chip or 'no NPU'}: they cannot be run"
            )
        print(f"  {self.device}, {self.chip or 'no NPU'}; offline models for {target or 'no chip'}", flush=True)
        return found

    def _target(self) -> str | None:
        """The chip to convert for; None leaves it at ONNX."""
        wanted: str | None = self.args.soc_version
        try:
            find_atc()
        except AtcError as error:
            if wanted:
                raise
            self.report.warn(f"ONNX files only: {error}")
            return None
        if wanted is None and self.chip is None:
            self.report.warn("ONNX files only: no NPU here says for which chip; --soc-version names one")
        return check_soc_version(wanted) if wanted else self.chip

    def convert(self) -> dict[str, Any]:
        args = self.args
        done = convert_clip(
            self.converter, args.model, args.output_dir, args.batch_size, dynamic_batch=args.dynamic_batch
        )
        paths = [*done["onnx_path"].values(), *(done["om_path"] or {}).values()]
        return {"files": {Path(path).name: Path(path).stat().st_size for path in paths}, "config": done["config"]}

    def configurations(self) -> list[tuple[Configuration, str]]:
        """What is compared with torch's float32 on the CPU, and as which precision it counts."""
        model, folder = self.args.model, str(self.args.output_dir)
        found = [(Configuration("cpu", "float32", ONNX, folder), "float32")]
        if self.device.type != "cpu":
            able = inference_dtypes(self.device)
            names = [name for name in LIMITS if DTYPES[name] in able]
            found += [(Configuration(self.device.type, name, TORCH, model), name) for name in names]
        if self.runs_offline_models:
            found.append((Configuration("npu", "float32", OM, folder), "float16"))  # as atc makes it by default
        return found

    def check_accuracy(self) -> dict[str, Any]:
        """Raises AccuracyError, after all were compared, where one is beyond its limits."""
        reference = ask(CLIPInferenceService(self.args.model, "cpu"), self.pairs)
        rows: dict[str, Any] = {}
        for configuration, precision in self.configurations():
            service = configuration.open()
            rows[configuration.name] = compare(ask(service, self.pairs), reference, LIMITS[precision])
            service.close()
        print(accuracy_table(rows), flush=True)
        self.report.sections["accuracy"] = rows  # also where it is not enough
        failed = [name for name, row in rows.items() if not row["passed"]]
        if failed:
            raise AccuracyError(f"{', '.join(failed)} beyond what may differ from torch's float32 on the CPU")
        return rows

    def measure(self) -> dict[str, Any]:
        image = self.args.output_dir / IMAGE
        picture = self.pairs.pictures[0]
        assert isinstance(picture, Image.Image)
        picture.save(image)
        benchmark = PerformanceBenchmark(self.args.model, str(self.args.output_dir))
        rows = benchmark.run_comparison(image, self.pairs.captions[:TEXTS], num_runs=self.args.num_runs)
        self.report.warnings += [f"{name} is not measured: {why}" for name, why in benchmark.skipped.items()]
        self.benchmark_table = comparison_table(rows)
        print(self.benchmark_table, flush=True)
        benchmark.save_results(self.args.output_dir / RESULTS)
        return benchmark.report()

    def write(self, result: str) -> None:
        content = {"result": result, "versions": versions(PACKAGES), **self.report.sections}
        write_json(self.args.output_dir / f"{REPORT}.json", {**content, "warnings": self.report.warnings})
        write_atomically(self.args.output_dir / f"{REPORT}.md", self.markdown(result).encode())

    def markdown(self, result: str) -> str:
        sections, args = self.report.sections, self.args
        lines = [f"# {Path(args.model).name}: {result}", ""]
        lines += [f"- {warning}" for warning in self.report.warnings]
        if "environment" in sections:
            names = ("device", "chip", "offline models for")
            lines += [f"- {name}: {sections['environment'][name] or 'none'}" for name in names]
        if "conversion" in sections:
            files = sections["conversion"]["files"].items()
            lines += ["", "## Files", "", *(f"- {name}: {size / 1e6:.1f} MB" for name, size in files)]
        if "accuracy" in sections:
            lines += ["", f"## Accuracy on {len(self.pairs.captions)} pictures", "", GATE, ""]
            lines += ["```", accuracy_table(sections["accuracy"]), "```"]
        if self.benchmark_table:
            about = f"A picture with {TEXTS} texts, {args.num_runs} runs after a warm-up; all is in {RESULTS}."
            lines += ["", "## Speed", "", about, "", "```", self.benchmark_table, "```"]
        return "\n".join(lines) + "\n"


GATE = (
    f"Each picture's best caption among {CHOICES}, against torch in float32 on the CPU: "
    + "; ".join(
        f"in {name} at most {100 * limits.changed:g} % other answers, and features' cosine {limits.cosine} or more"
        for name, limits in LIMITS.items()
    )
    + "."
)


class AccuracyError(RuntimeError):
    """Something computes too differently from the model."""


def accuracy_table(rows: dict[str, Any]) -> str:
    headings = ["right %", "changed %", "least cosine", "logit error", "passed"]
    numbers = [
        (
            name,
            [100 * row["right"], 100 * row["changed"], row["cosine"], row["max_logit_error"], int(row["passed"])],
            ".6g",
        )
        for name, row in rows.items()
    ]
    return format_table(headings, numbers)


def deploy(args: argparse.Namespace, pairs: Pairs) -> None:
    """Run all steps. Ends the program with exit code 1 where accuracy or atc fails."""
    try:
        Deployment(args, pairs).run()
    except (AccuracyError, AtcError) as error:
        fail(error, FAILED)
