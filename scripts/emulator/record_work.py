"""Record what the parts of a picture take on the emulated chips, by which the estimates are calibrated.

    python scripts/emulator/record_work.py

runs the parts of Stable Diffusion 2.1-base and 1.5 in their true sizes, 512 x 512, with random weights: whole passes
of the UNet and shallow ones, with 1 row and 2, the text encoder and the VAE's decoder, with fused kernels, in float16,
as compiled graphs. Each runs twice, and the launches of the second time make the numbers of --output: the sum of what
each takes at the nominal speed and bandwidth. On two cores that takes an hour and 12 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from emulator import calibration, profile, report
from runners.cli import ArgumentParser, UserError, file_path, one_line_errors
from runners.files import write_atomically
from scripts.benchmarks.count_step import read_events

LATENTS = 64
CHANNELS_AT_CUT = {(0, 0): 320, (0, 1): 320, (0, 2): 640}  # by DeepCache's block and layer; ModelZoo's is the last
MODELS = ("sd2.1-base", "sd1.5")
# What of runwayml/stable-diffusion-v1-5 is other than of stabilityai/stable-diffusion-2-1-base.
SD15_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
}
SD15_UNET = {"attention_head_dim": 8, "cross_attention_dim": 768, "use_linear_projection": False}
HEADER = f"""\
# Written by `{calibration.RECORDER}`, which says what it is: milliseconds at the nominal figures
# of the chip. A part is one forward pass; GFLOP and MB are those of its launches.
"""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="record_work.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--output",
        type=file_path,
        default=calibration.PUBLISHED / "work.toml",
        metavar="FILE",
        help="(the emulator's)",
    )
    add("--worker", nargs=2, metavar=("MODEL", "FILE"), help=argparse.SUPPRESS)  # the process on the emulated chip
    return parser.parse_args(arguments)


def make_pipeline(model: str) -> Any:
    """The pipeline on the chip, in float16, with random weights and fused kernels, compiled."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from ascend.device import DeviceManager
    from processors import enable_flash_attention
    from scripts.benchmarks.benchmark import SD21_BASE_UNET
    from scripts.benchmarks.benchmark_parallel import SD21_TEXT, SD21_VAE

    torch.manual_seed(0)
    is_sd15 = model == "sd1.5"
    pipe = StableDiffusionPipeline(
        unet=UNet2DConditionModel(**SD21_BASE_UNET | (SD15_UNET if is_sd15 else {})),
        vae=AutoencoderKL(**SD21_VAE, sample_size=8 * LATENTS),
        text_encoder=CLIPTextModel(CLIPTextConfig(**SD21_TEXT | (SD15_TEXT if is_sd15 else {}), projection_dim=512)),
        tokenizer=None,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16)
    pipe.to(DeviceManager("npu").device)
    enable_flash_attention(pipe)
    return pipe


def parts_of(pipe: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and call of each part."""
    import torch

    from runners.unet_cost import PROMPT_TOKENS

    like = {"device": pipe.device, "dtype": torch.float16}
    for batch, rows in ((1, "1 row"), (2, "2 rows")):
        latents = torch.randn(batch, 4, LATENTS, LATENTS, **like)
        prompt = torch.randn(batch, PROMPT_TOKENS, pipe.unet.config.cross_attention_dim, **like)
        step = torch.tensor(981, device=pipe.device)
        yield f"UNet, {rows}", partial(pipe.unet, latents, step, prompt, return_dict=False)
        for branch, channels in CHANNELS_AT_CUT.items():
            feature = torch.randn(batch, channels, LATENTS, LATENTS, **like)
            shallow = {"cache_branch": branch, "cached_feature": feature, "return_dict": False}
            name = f"UNet cut at {branch[0]},{branch[1]}, {rows}"
            yield name, partial(pipe.unet, latents, step, prompt, **shallow)
    tokens = torch.ones(1, PROMPT_TOKENS, dtype=torch.int64, device=pipe.device)
    yield "text encoder", partial(pipe.text_encoder, tokens)
    yield "VAE decoder", partial(pipe.vae.decode, latents[:1], return_dict=False)


def measure(model: str, result: Path) -> None:
    """Write the launches of each part on the emulated chip of this process to `result`."""
    import torch

    from ascend.graphs.compile import compile_pipeline

    npu = torch.get_device_module("npu")
    npu.set_task_queue_enable(0)  # so that the trace has a launch as soon as it is made
    trace = Path(os.environ["CANN_EMULATOR_TRACE"])
    found = []
    with tempfile.TemporaryDirectory() as graphs, torch.no_grad():
        pipe = make_pipeline(model)
        compile_pipeline(pipe, Path(graphs))
        for part, call in parts_of(pipe):
            print(f"{model}: {part} ...", flush=True)
            call()
            npu.synchronize()
            start = trace.stat().st_size
            call()
            npu.synchronize()
            events = read_events(trace, start, trace.stat().st_size)
            found.append({"part": part, "launches": [e for e in events if e["event"] == "launch"]})
    result.write_text(json.dumps(found), encoding="utf-8")


def record(soc: str, model: str, folder: Path) -> list[str]:
    """The lines of the parts of `model` on the emulated chip `soc`, and on those that are counted with it."""
    trace, result = folder / "trace.jsonl", folder / "parts.json"
    emulator = [sys.executable, "-m", "emulator", "run", "--soc", soc, "--trace", str(trace), "--"]
    worker = [sys.executable, __file__, "--worker", model, str(result)]
    if subprocess.run([*emulator, *worker], cwd=ROOT, check=False).returncode:
        raise UserError(f"{model} on {soc}: the run failed, see above")
    chip = profile.load(soc)
    parts = json.loads(result.read_text(encoding="utf-8"))
    return [format_part(name, model, part, with_figures(name, chip)) for name in names_of(soc) for part in parts]


def names_of(soc: str) -> list[str]:
    """The chip itself and those of times.toml that are counted with its launches."""
    return sorted({soc} | {name for name, row in calibration.chips().items() if row["profile"] == soc})


def with_figures(name: str, chip: dict[str, Any]) -> dict[str, Any]:
    """The profile with the speed and bandwidth of the chip `name`."""
    own = calibration.figures(name, chip)
    tflops = {**chip["tflops"], "float16": own["float16"]}
    return {**chip, "tflops": tflops, "memory": {**chip["memory"], "bandwidth": own["bandwidth"]}}


def format_part(name: str, model: str, part: dict[str, Any], chip: dict[str, Any]) -> str:
    launches = part["launches"]
    gflop, megabytes = sum(e["flops"] for e in launches) / 1e9, sum(e["bytes"] for e in launches) / 1e6
    ms = sum(report.estimate_seconds(e, chip) for e in launches) * 1e3
    return (
        f'  {{ chip = "{name}", model = "{model}", part = "{part["part"]}",'
        f" launches = {len(launches)}, gflop = {gflop:.1f}, mb = {megabytes:.1f}, ms = {ms:.4f} }},"
    )


def run(args: argparse.Namespace) -> None:
    if args.worker:
        measure(args.worker[0], Path(args.worker[1]))
        return
    lines = ["parts = ["]
    for soc in profile.names():
        for model in MODELS:
            with tempfile.TemporaryDirectory() as folder:
                lines += record(soc, model, Path(folder))
    lines.append("]")
    for soc in profile.names():
        for name in names_of(soc):
            own = calibration.figures(name, profile.load(soc))
            lines += ["", f"[figures.{name}]", *(f"{key} = {value}" for key, value in own.items())]
    write_atomically(args.output, (HEADER + "\n" + "\n".join(lines) + "\n").encode())


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        run(parse_arguments(arguments))


if __name__ == "__main__":
    main()
