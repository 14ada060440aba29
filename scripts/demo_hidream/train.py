"""Train the demo editor: HiDream-E1.1 in small, from nothing, on edits of scenes it renders itself.

    python scripts/demo_hidream/train.py
    python scripts/demo_hidream/train.py --stage train --device cuda --batch 512 --seconds 150 --compile

The stages run in order, each from what the ones before left in --work_dir:

    dataset     render scenes, encode them by the demo model's VAE, and put the edits between them into words
    train       learn the flow from noise to the edited picture, and for refining to a described one; text encoders,
                editor and refiner together
    decoder     teach the VAE's decoder to draw these scenes' shapes crisply
    export      write the float16 folder that HiDreamImageEditingPipeline.from_pretrained loads, the refiner inside

Stop it any time: the same command goes on from the last checkpoint. Without one, `train` starts from the weights that
it finds in the work folder, as another machine may have left them. With --steps it ends at the weights that an
uninterrupted run ends at; with --seconds it takes that long, and the learning rate falls with the time that is left.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from diffusers import AutoencoderKL, HiDreamImageEditingPipeline

from ascend.device import DeviceManager
from ascend.memory import keep_freed_memory
from runners.cli import (
    ArgumentParser,
    UserError,
    file_path,
    finite_float,
    non_negative_int,
    one_line_errors,
    positive_int,
)
from runners.files import make_output_dir, write_json
from runners.model_dir import DEFAULTS
from scripts.demo_hidream.dataset import Dataset, make_dataset
from scripts.demo_hidream.networks import build_scheduler, build_tokenizer
from scripts.demo_hidream.scenes import sample_scene
from scripts.demo_hidream.training import Networks, draw_batch, losses
from scripts.demo_model.scenes import BACKGROUNDS, IMAGE_SIZE
from scripts.demo_model.stages import to_tensor
from scripts.demo_model.train import LATENT_NOISE, reconstruction_error
from scripts.demo_model.training import MAX_GRADIENT_NORM, fit, save_tensors, update_average

DEMO_MODEL = ROOT / "examples/hidream_e1/demo_model"
VAE = ROOT / "examples/sd2.1/demo_model/vae"
DATASET, CHECKPOINT = "dataset.npz", "train.pt"
REFINER = "refiner"  # folder beside the pipeline's components
PARTS = ("texts", "editor", "refiner")  # of Networks, each in a file of its own
WARMUP_STEPS = 200
COOLDOWN = 0.4  # share of a run in which the learning rate falls to zero
EMA_DECAY = 0.998
DECODER_LEARNING_RATE = 5e-4
WANTS = {"guidance_scale": 1.5, "image_guidance_scale": 1.5, "side": IMAGE_SIZE, "prompt": "{instruction}"}


@dataclass(frozen=True)
class Run:
    """What the stages share."""

    work_dir: Path
    output_dir: Path
    dataset: Path | None
    device: torch.device
    seed: int
    families: int
    batch: int
    steps: int
    seconds: int | None
    learning_rate: float
    save_seconds: int
    compile: bool
    decoder_steps: int
    decoder_batch: int

    def load_dataset(self) -> Dataset:
        path = self.dataset or self.work_dir / DATASET
        if not path.exists():
            raise UserError(f"{path} is missing: run --stage dataset first")
        return Dataset.load(path)

    def load_vae(self) -> AutoencoderKL:
        """The demo model's, with its decoder as far as it was taught."""
        vae = AutoencoderKL.from_pretrained(VAE, dtype=torch.float32)
        taught = self.work_dir / "decoder.safetensors"
        if taught.exists():
            decoder_of(vae).load_state_dict(load_file(taught))
        return vae.requires_grad_(False).eval().to(self.device)


def run_dataset(run: Run) -> None:
    make_dataset(run.families, run.seed, run.load_vae(), build_tokenizer(), run.device).save(run.work_dir / DATASET)


def run_train(run: Run) -> None:
    data = run.load_dataset()
    scale, shift = data.scale, data.shift
    data = data.to(run.device)
    torch.manual_seed(run.seed)
    networks = Networks(build_tokenizer())
    checkpoint = run.work_dir / CHECKPOINT
    if not checkpoint.exists() and (run.work_dir / weights_name("editor")).exists():
        load_weights(networks, run.work_dir)
    networks.to(run.device).train()
    if run.compile:
        # A graph that cannot be made is no reason to stop: dynamo says so, and runs that block as it is.
        torch._dynamo.config.suppress_errors = True
        networks.compile_blocks()
    generator = torch.Generator(run.device)

    def loss(step: int) -> tuple[Tensor, Tensor]:
        generator.manual_seed(random.Random(f"{run.seed}/train/{step}").getrandbits(63))
        batch = draw_batch(data, run.batch, scale, shift, generator)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.device.type != "cpu"):
            return losses(networks, batch, generator)

    train(run, networks, loss, checkpoint)


def train(run: Run, networks: Networks, loss: Callable[[int], tuple[Tensor, Tensor]], checkpoint: Path) -> None:
    """Train in place, with AdamW, to the last step or second. `loss` gives the losses of a step by its number."""
    optimizer = torch.optim.AdamW(
        networks.parameters(), lr=run.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    average = {name: value.detach().clone() for name, value in networks.named_parameters()}
    done = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=run.device, weights_only=True)
        networks.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, done = state["average"], state["done"]
    start = saved = time.monotonic()
    bar = tqdm(total=run.steps, initial=done, desc="train", unit="step", mininterval=2)
    while True:
        now = time.monotonic()
        progress = max(done / run.steps, (now - start) / run.seconds if run.seconds else 0.0)
        if progress >= 1 or now - saved >= run.save_seconds:
            state = {"done": done, "average": average, "model": networks.state_dict()}
            save_tensors(state | {"optimizer": optimizer.state_dict()}, checkpoint)
            save_weights(networks, average, run.work_dir)
            saved = now
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate * min(1.0, (done + 1) / WARMUP_STEPS, (1 - progress) / COOLDOWN)
        optimizer.zero_grad()
        editing, refining = loss(done)
        (editing + refining).backward()
        nn.utils.clip_grad_norm_(networks.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        update_average(average, networks, done, EMA_DECAY)
        done += 1
        if done % 20 == 0:
            bar.set_postfix(editing=f"{editing.item():.4f}", refining=f"{refining.item():.4f}", refresh=False)
        bar.update()
    bar.close()


def weights_name(part: str) -> str:
    return f"{part}.safetensors"


def save_weights(networks: Networks, average: dict[str, Tensor], folder: Path) -> None:
    """The running averages in float16: less than 30 MB together."""
    for part in PARTS:
        values = {k.removeprefix(f"{part}."): v.half().cpu() for k, v in average.items() if k.startswith(f"{part}.")}
        temporary = folder / (weights_name(part) + ".tmp")
        save_file(values, temporary)
        os.replace(temporary, folder / weights_name(part))


def load_weights(networks: Networks, folder: Path) -> None:
    """What `save_weights` wrote.

    Raises:
        UserError: a file is missing, or belongs to other networks.
    """
    for part in PARTS:
        path = folder / weights_name(part)
        if not path.exists():
            raise UserError(f"{path} is missing: run --stage train first")
        module, values = networks.get_submodule(part), load_file(path)
        if set(values) != {name for name, _ in module.named_parameters()}:  # weights that are tied stand there once
            raise UserError(f"{path} belongs to other networks than these: remove it and train again")
        module.load_state_dict(values, strict=False)


def decoder_of(vae: AutoencoderKL) -> nn.ModuleDict:
    return nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder})


def run_decoder(run: Run) -> None:
    """Teach the decoder these scenes, from latents that are a little wrong. The encoder stays, and the latents."""
    vae = run.load_vae()
    decoder = decoder_of(vae).requires_grad_(True)

    def loss(step: int) -> Tensor:
        rng = random.Random(f"{run.seed}/decoder/{step}")
        torch.manual_seed(rng.getrandbits(63))
        scenes = [sample_scene(rng, rng.randint(1, 4)) for _ in range(run.decoder_batch)]
        images = [scene.render() for scene in scenes]
        backgrounds = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes]).view(-1, 1, 1, 3)
        shapes = (torch.from_numpy(np.stack(images)) != backgrounds).any(dim=-1).unsqueeze(1).to(run.device)
        pictures = to_tensor(images, run.device)
        with torch.no_grad():
            latents = vae.encode(pictures).latent_dist.mode()
        level = LATENT_NOISE * torch.rand(run.decoder_batch, 1, 1, 1)
        noise = (level * torch.randn(latents.shape)).to(run.device)
        return reconstruction_error(vae.decode(latents + noise).sample - pictures, shapes)

    fit(decoder, loss, run.decoder_steps, DECODER_LEARNING_RATE, run.work_dir / "decoder.pt")
    save_file({k: v.contiguous().cpu() for k, v in decoder.state_dict().items()}, run.work_dir / "decoder.safetensors")


def run_export(run: Run) -> None:
    networks = Networks(build_tokenizer())
    load_weights(networks, run.work_dir)
    data, vae = run.load_dataset(), run.load_vae().cpu()
    vae.register_to_config(scaling_factor=data.scale, shift_factor=data.shift, _name_or_path="")  # no path of here
    pipeline = assemble(networks, vae).to(dtype=torch.float16)
    temporary = run.output_dir.with_name(run.output_dir.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.save_pretrained(temporary)
    networks.refiner.half().save_pretrained(temporary / REFINER)
    write_json(temporary / DEFAULTS, WANTS)
    shutil.rmtree(run.output_dir, ignore_errors=True)
    os.replace(temporary, run.output_dir)
    size = sum(file.stat().st_size for file in run.output_dir.rglob("*") if file.is_file())
    print(f"{run.output_dir}: {size / 1e6:.1f} MB")


def assemble(networks: Networks, vae: AutoencoderKL) -> HiDreamImageEditingPipeline:
    tokenizers = {name: build_tokenizer() for name in ("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4")}
    encoders = dict(networks.texts.named_children())
    return HiDreamImageEditingPipeline(
        scheduler=build_scheduler(), vae=vae, transformer=networks.editor, **encoders, **tokenizers
    )


STAGES: dict[str, Callable[[Run], None]] = {
    "dataset": run_dataset,
    "train": run_train,
    "decoder": run_decoder,
    "export": run_export,
}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", choices=("all", *STAGES), default="all", metavar="NAME", help="run this stage only (all)")
    add(
        "--output_dir",
        type=file_path,
        default=DEMO_MODEL,
        metavar="DIR",
        help="of the model (examples/hidream_e1/demo_model)",
    )
    add(
        "--work_dir",
        type=file_path,
        default=Path("outputs/demo_hidream_training"),
        metavar="DIR",
        help="of the dataset, checkpoints and weights (outputs/demo_hidream_training)",
    )
    add("--dataset", type=file_path, metavar="FILE", help="made elsewhere (dataset.npz in the work folder)")
    add("--device", metavar="NAME", help="npu, cuda or cpu, or one of several as npu:1 (the best there is)")
    add("--seed", type=non_negative_int, default=0, metavar="N", help="(0)")
    add("--families", type=positive_int, default=5700, metavar="N", help="of about seven scenes each (5700)")
    add("--batch", type=positive_int, default=512, metavar="N", help="edits in a step (512)")
    add("--steps", type=positive_int, default=10_000, metavar="N", help="of the whole training (10000)")
    add("--seconds", type=positive_int, metavar="S", help="stop earlier, when this run took so long")
    add("--learning_rate", type=finite_float, default=1.2e-3, metavar="R", help="the peak (0.0012)")
    add("--save_seconds", type=non_negative_int, default=30, metavar="S", help="from checkpoint to checkpoint (30)")
    add("--compile", action="store_true", help="the transformers' blocks")
    add("--decoder_steps", type=positive_int, default=600, metavar="N", help="(600)")
    add("--decoder_batch", type=positive_int, default=8, metavar="N", help="pictures in a step (8)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        args = vars(parse_arguments(arguments))
        stage = args.pop("stage")
        keep_freed_memory()
        torch.set_float32_matmul_precision("high")
        device, work_dir = DeviceManager(args.pop("device")).device, make_output_dir(args.pop("work_dir"))
        run = Run(device=device, work_dir=work_dir, **args)
        for name in STAGES if stage == "all" else [stage]:
            STAGES[name](run)


if __name__ == "__main__":
    main()
