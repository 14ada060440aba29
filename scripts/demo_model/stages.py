"""What the trainings of small Stable Diffusion models share: a folder of work that stages hand on, and its export."""

from __future__ import annotations

import argparse
import os
import random
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from ascend.device import DeviceManager
from ascend.memory import keep_freed_memory
from runners.cli import ArgumentParser, UserError, file_path, non_negative_int, positive_int
from runners.files import make_output_dir, write_json
from runners.model_dir import DEFAULTS
from runners.training.objective import add_noise, levels, target, weighted_error
from scripts.demo_model.networks import TEXT_LENGTH, build_text_encoder, build_unet, build_vae
from scripts.demo_model.training import save_tensors

Model = TypeVar("Model", bound=nn.Module)
INITIAL_LOGVAR = -6.0  # start with nearly no noise in the latents
THUMBNAIL_WEIGHT = 5.0  # of the rule that three latent channels hold the picture, reduced eight times
KL_WEIGHT = 1e-3  # per latent number
CAPTION_DROPOUT = 0.1  # share of captions replaced by the empty one, which classifier-free guidance subtracts


@dataclass(frozen=True)
class Run:
    """What all stages need."""

    work_dir: Path
    output_dir: Path
    device: torch.device
    seed: int
    save_every: int

    def rng(self, stage: str, step: int) -> random.Random:
        """The only source of chance in a step of a stage. Also seeds torch, whose generators draw the noise."""
        rng = random.Random(f"{self.seed}/{stage}/{step}")
        torch.manual_seed(rng.getrandbits(63))
        return rng

    def need(self, name: str, stage: str) -> Path:
        """The path of a file or folder in the work folder.

        Raises:
            UserError: it is not there; says which stage makes it.
        """
        path = self.work_dir / name
        if not path.exists():
            raise UserError(f"{path} is missing: run --stage {stage} first")
        return path

    def load(self, model: Model, stage: str) -> Model:
        """`model` with the weights a stage left, frozen, on the device."""
        model.load_state_dict(load_file(self.need(f"{stage}.safetensors", stage)))
        return model.requires_grad_(False).eval().to(self.device)

    def save(self, model: nn.Module, stage: str) -> None:
        temporary = self.work_dir / f"{stage}.safetensors.tmp"
        save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, temporary)
        os.replace(temporary, self.work_dir / f"{stage}.safetensors")

    def load_tokenizer(self) -> CLIPTokenizer:
        return CLIPTokenizer.from_pretrained(self.need("tokenizer", "tokenizer"))

    def load_latents(self) -> dict[str, Any]:
        """What `cache_latents` wrote."""
        return torch.load(self.need("latents.pt", "latents"), weights_only=True)


AnyRun = TypeVar("AnyRun", bound=Run)


def to_tensor(images: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """uint8 pictures [height, width, 3] as one float tensor [count, 3, height, width] in -1 to 1."""
    return torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(tensor: Tensor) -> np.ndarray:
    """The reverse of `to_tensor`, as one array [count, height, width, 3]."""
    return ((tensor.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def start_with_clean_latents(vae: AutoencoderKL) -> AutoencoderKL:
    nn.init.constant_(vae.quant_conv.bias[vae.config.latent_channels :], INITIAL_LOGVAR)
    return vae


def latent_penalty(posterior: DiagonalGaussianDistribution, pictures: Tensor) -> Tensor:
    """What a VAE pays beside its errors, as a scalar: for latents far from the small picture, and for their size."""
    # Without this rule the encoder takes thousands of steps to tell yellow from orange.
    thumbnail_error = (posterior.mean[:, :3] - F.avg_pool2d(pictures, 8)).square().mean()
    divergence = posterior.kl().mean() / posterior.mean[0].numel()
    return THUMBNAIL_WEIGHT * thumbnail_error + KL_WEIGHT * divergence


def cache_latents(run: Run, vae: AutoencoderKL, picture: Callable[[int], np.ndarray], count: int) -> None:
    """Write latents.pt: float32 [count, 4, 16, 16] of the pictures by their numbers, and what gives unit variance."""
    chunks = []
    for start in tqdm(range(0, count, 64), desc="latents", unit="batch"):
        pictures = [picture(index) for index in range(start, min(start + 64, count))]
        with torch.no_grad():
            chunks.append(vae.encode(to_tensor(pictures, run.device)).latent_dist.mode().cpu())
    latents = torch.cat(chunks)
    save_tensors({"latents": latents, "scaling_factor": 1 / latents.std().item()}, run.work_dir / "latents.pt")


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Captions as the pipeline would read them, int64 [count, 77]."""
    return tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").input_ids


def denoising_loss(
    unet: UNet2DConditionModel,
    latents: Tensor,
    text: Tensor,
    schedule: DDIMScheduler | PNDMScheduler,
    gamma: float | None = None,
) -> Tensor:
    """The loss of a UNet at random timesteps, as a scalar on its device. Draws from torch's generator of the CPU.

    Args:
        latents: of unit variance, float32 [count, 4, height, width], on the CPU.
        text: what the text encoder makes of their captions, [count, 77, width], on the UNet's device.
        schedule: says what the UNet predicts, the noise or the velocity.
        gamma: of `min_snr_weights`; None weighs all timesteps alike.
    """
    noise = torch.randn(latents.shape)
    timesteps = torch.randint(0, schedule.config.num_train_timesteps, (len(latents),))
    prediction = schedule.config.prediction_type
    at = levels(schedule.alphas_cumprod, timesteps, prediction, gamma)
    noisy, wanted = add_noise(latents, noise, at), target(latents, noise, at, prediction)
    predicted = unet(noisy.to(text.device), timesteps.to(text.device), text).sample
    return weighted_error(predicted, wanted.to(text.device), at.weight.to(text.device))


def assemble(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler | PNDMScheduler,
) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_parts(run: Run, vae_stage: str, scheduler: DDIMScheduler | PNDMScheduler) -> StableDiffusionPipeline:
    """The pipeline with all that was trained before the UNet, and a UNet that knows nothing.

    `vae_stage` is the last that trained the VAE.
    """
    tokenizer = run.load_tokenizer()
    vae = run.load(build_vae(), vae_stage)
    vae.register_to_config(scaling_factor=run.load_latents()["scaling_factor"])
    text_encoder = run.load(build_text_encoder(tokenizer), "text")
    return assemble(vae, text_encoder, tokenizer, build_unet(), scheduler)


def draw_pictures(pipeline: StableDiffusionPipeline, captions: Sequence[str], seed: int, **options: Any) -> np.ndarray:
    """A picture of every caption, uint8 [count, height, width, 3]. `options` are the pipeline's."""
    generator = torch.Generator().manual_seed(seed)
    pictures = pipeline(list(captions), generator=generator, output_type="np", **options).images
    return (pictures * 255).round().astype(np.uint8)


def export(pipeline: StableDiffusionPipeline, output_dir: Path, guidance_scale: float) -> None:
    """Write the float16 folder that `from_pretrained` loads, in place of the one there. Casts `pipeline`."""
    temporary = output_dir.with_name(output_dir.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.to(dtype=torch.float16).save_pretrained(temporary)
    # vocab.json and merges.txt, as in SD2.1
    pipeline.tokenizer.backend_tokenizer.model.save(str(temporary / "tokenizer"))
    write_json(temporary / DEFAULTS, {"guidance_scale": guidance_scale})
    shutil.rmtree(output_dir, ignore_errors=True)
    os.replace(temporary, output_dir)
    size = sum(file.stat().st_size for file in output_dir.rglob("*") if file.is_file())
    print(f"{output_dir}: {size / 1e6:.1f} MB")


def add_run_arguments(
    parser: ArgumentParser,
    stages: Iterable[str],
    output_dir: Path,
    work_dir: Path,
    lengths: Mapping[str, tuple[int, int]],
) -> None:
    """Add the fields of `Run`, and of each stage in `lengths` its steps and its batch."""
    add = parser.add_argument
    add("--stage", choices=("all", *stages), default="all", metavar="NAME", help="run this stage only (all)")
    add(
        "--output_dir",
        type=file_path,
        default=output_dir,
        metavar="DIR",
        help=f"of the model ({os.path.relpath(output_dir)})",
    )
    add(
        "--work_dir",
        type=file_path,
        default=work_dir,
        metavar="DIR",
        help=f"of checkpoints, latents and previews ({work_dir})",
    )
    add("--device", metavar="NAME", help="npu, cuda or cpu, or one of several as npu:1 (the best there is)")
    add("--seed", type=non_negative_int, default=0, metavar="N", help="(0)")
    for stage, (steps, batch) in lengths.items():
        add(f"--{stage}_steps", type=positive_int, default=steps, metavar="N", help=f"({steps})")
        add(f"--{stage}_batch", type=positive_int, default=batch, metavar="N", help=f"examples in a step ({batch})")
    add("--save_every", type=positive_int, default=250, metavar="N", help="steps from checkpoint to checkpoint (250)")


def run_stages(args: argparse.Namespace, run: type[AnyRun], stages: Mapping[str, Callable[[AnyRun], None]]) -> None:
    """Run the stage that `args` name, or all in their order. `args` are those of `add_run_arguments` and `run`'s."""
    settings = vars(args)
    stage = settings.pop("stage")
    keep_freed_memory()
    device, work_dir = DeviceManager(settings.pop("device")).device, make_output_dir(settings.pop("work_dir"))
    shared = run(device=device, work_dir=work_dir, **settings)
    for name in stages if stage == "all" else [stage]:
        stages[name](shared)
