"""Train the photo model: the demo model's networks, trained in another way on another world, crops of 14 photographs.

    python scripts/photo_model/train.py

A second model, by which a setting can be told that suits the demo model alone. That one predicts the noise in flat
shapes, this one the velocity (v-prediction, as Stable Diffusion 2.1 for 768 pixels) in real textures, all timesteps
weighed alike; its scheduler is DDIM. Prompts are as "a photo of a cat": see photos.py.

The stages run in order, each from what the ones before left in --work_dir:

    tokenizer   learn a BPE vocabulary from the captions
    vae         learn to squeeze 128x128 pictures into 4x16x16 latents and back
    latents     encode the training pictures once, so that the UNet never waits for the VAE
    text        teach the text encoder to tell of which photograph a caption is
    unet        learn to predict the velocity of a latent, given the frozen text encoder's view of its caption
    export      write the float16 folder that StableDiffusionPipeline.from_pretrained loads, and prompts.txt
    grid        load it, and draw grid.png in --work_dir, a column for each photograph

Stop it any time: the same command goes on from the last checkpoint, and ends at the weights an uninterrupted run ends
at, because each step draws its data from the seed and its own number alone. `--stage export` exports the UNet of the
last checkpoint, too.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from diffusers import DDIMScheduler, StableDiffusionPipeline

from runners.cli import ArgumentParser, one_line_errors, positive_int
from runners.files import write_atomically
from runners.model_dir import load_pipeline
from scripts.demo_model.networks import TEXT_WIDTH, build_text_encoder, build_vae, train_tokenizer
from scripts.demo_model.scenes import IMAGE_SIZE
from scripts.demo_model.stages import (
    CAPTION_DROPOUT,
    Run,
    add_run_arguments,
    cache_latents,
    denoising_loss,
    draw_pictures,
    export,
    latent_penalty,
    load_parts,
    run_stages,
    start_with_clean_latents,
    to_images,
    to_tensor,
    tokenize,
)
from scripts.demo_model.training import fit, save_grid
from scripts.photo_model.photos import CAPTIONS, PHOTOS, crop, load_photo

NAMES = list(PHOTOS)
CLOSE_UP_SHARE = 0.85  # of the VAE's steps, on quarters of pictures
STEPS_AND_BATCHES = {"vae": (1600, 8), "unet": (3000, 16)}
TEXT_STEPS = 60
GUIDANCE_SCALE = 3.0


@dataclass(frozen=True)
class PhotoRun(Run):
    """What the stages share."""

    crops: int
    vae_steps: int
    vae_batch: int
    unet_steps: int
    unet_batch: int
    draw_steps: int
    grid_rows: int

    def training_crop(self, index: int) -> np.ndarray:
        """A picture of the UNet's training set, of each photograph in turn."""
        return crop(load_photo(NAMES[index % len(NAMES)]), random.Random(f"{self.seed}/crop/{index}"))


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def run_tokenizer(run: PhotoRun) -> None:
    captions = [caption for wordings in CAPTIONS.values() for caption in wordings]
    train_tokenizer(captions).save_pretrained(run.work_dir / "tokenizer")


def run_vae(run: PhotoRun) -> None:
    run.rng("vae", -1)
    vae = start_with_clean_latents(build_vae()).to(run.device)
    shown = [crop(load_photo(name), random.Random(f"{run.seed}/preview")) for name in NAMES]

    def loss(step: int) -> Tensor:
        rng = run.rng("vae", step)
        # GroupNorm sees other statistics in quarters, so the last steps are on whole pictures.
        size = IMAGE_SIZE // 2 if step < CLOSE_UP_SHARE * run.vae_steps else IMAGE_SIZE
        chosen = rng.choices(NAMES, k=run.vae_batch)
        pictures = to_tensor([crop(load_photo(name), rng, size) for name in chosen], run.device)
        posterior = vae.encode(pictures).latent_dist
        difference = vae.decode(posterior.sample()).sample - pictures
        return (difference.abs() + difference.square()).mean() + latent_penalty(posterior, pictures)

    @torch.no_grad()
    def preview(step: int) -> None:
        pictures = to_images(vae.decode(vae.encode(to_tensor(shown, run.device)).latent_dist.mode()).sample)
        error = np.square(pictures.astype(float) - shown).mean()
        tqdm.write(f"vae step {step}: {10 * np.log10(255**2 / error):.1f} dB")
        save_grid(np.concatenate([shown, pictures]), run.work_dir / "vae.png", columns=len(NAMES))

    fit(vae, loss, run.vae_steps, 2e-3, run.work_dir / "vae.pt", run.save_every, preview)
    run.save(vae, "vae")


def run_latents(run: PhotoRun) -> None:
    cache_latents(run, run.load(build_vae(), "vae"), run.training_crop, run.crops)


def run_text(run: PhotoRun) -> None:
    tokenizer = run.load_tokenizer()
    run.rng("text", -1)
    networks = nn.ModuleDict({"encoder": build_text_encoder(tokenizer), "classes": nn.Linear(TEXT_WIDTH, len(NAMES))})
    networks.to(run.device)
    captions = [caption for name in NAMES for caption in CAPTIONS[name]]
    # The end of a caption, which is what is read, does not see the padding behind it: the shortest will do.
    tokens = tokenizer(captions, padding=True, return_tensors="pt").input_ids.to(run.device)
    classes = torch.tensor([NAMES.index(name) for name in NAMES for _ in CAPTIONS[name]], device=run.device)

    def loss(step: int) -> Tensor:
        return F.cross_entropy(networks["classes"](networks["encoder"](tokens).pooler_output), classes)

    fit(networks, loss, TEXT_STEPS, 1e-3, run.work_dir / "text.pt", run.save_every)
    run.save(networks["encoder"], "text")


def run_unet(run: PhotoRun) -> None:
    run.rng("unet", -1)
    pipeline = load_parts(run, "vae", build_scheduler())
    unet, schedule = pipeline.unet.to(run.device), build_scheduler()
    latents = run.load_latents()["latents"] * pipeline.vae.config.scaling_factor
    captions = ["", *(caption for name in NAMES for caption in CAPTIONS[name])]
    with torch.no_grad():
        texts = pipeline.text_encoder(tokenize(pipeline.tokenizer, captions).to(run.device)).last_hidden_state

    def loss(step: int) -> Tensor:
        rng = run.rng("unet", step)
        chosen = rng.choices(range(len(latents)), k=run.unet_batch)
        said = ["" if rng.random() < CAPTION_DROPOUT else rng.choice(CAPTIONS[NAMES[i % len(NAMES)]]) for i in chosen]
        text = texts[[captions.index(caption) for caption in said]]
        return denoising_loss(unet, latents[chosen], text, schedule)

    def preview(step: int) -> None:
        run.save(unet, "unet")
        save_grid(draw_row(run, pipeline, run.seed), run.work_dir / "unet.png", columns=len(NAMES))

    fit(unet, loss, run.unet_steps, 1e-3, run.work_dir / "unet.pt", run.save_every, preview)


def draw_row(run: PhotoRun, pipeline: StableDiffusionPipeline, seed: int) -> np.ndarray:
    """A picture of each class, uint8 [classes, 128, 128, 3]."""
    captions = [CAPTIONS[name][0] for name in NAMES]
    options = {"num_inference_steps": run.draw_steps, "guidance_scale": GUIDANCE_SCALE}
    return draw_pictures(pipeline, captions, seed, **options)


def run_export(run: PhotoRun) -> None:
    pipeline = load_parts(run, "vae", build_scheduler())
    run.load(pipeline.unet, "unet")
    export(pipeline, run.output_dir, GUIDANCE_SCALE)
    prompts = [caption for name in NAMES for caption in CAPTIONS[name]]
    write_atomically(run.output_dir / "prompts.txt", ("\n".join(prompts) + "\n").encode())


def run_grid(run: PhotoRun) -> None:
    pipeline = load_pipeline(StableDiffusionPipeline, run.output_dir, torch.float32).to(run.device)
    pipeline.set_progress_bar_config(disable=True)
    seeds = tqdm(range(run.seed, run.seed + run.grid_rows), desc="grid", unit="row")
    rows = [draw_row(run, pipeline, seed) for seed in seeds]
    save_grid(np.concatenate(rows), run.work_dir / "grid.png", columns=len(NAMES))


STAGES: dict[str, Callable[[PhotoRun], None]] = {
    "tokenizer": run_tokenizer,
    "vae": run_vae,
    "latents": run_latents,
    "text": run_text,
    "unet": run_unet,
    "export": run_export,
    "grid": run_grid,
}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    outputs = Path("outputs")
    add_run_arguments(parser, STAGES, outputs / "photo_model", outputs / "photo_training", STEPS_AND_BATCHES)
    add = parser.add_argument
    add("--crops", type=positive_int, default=4200, metavar="N", help="training pictures for the UNet (4200)")
    add("--draw_steps", type=positive_int, default=25, metavar="N", help="denoising steps of what is drawn (25)")
    add("--grid_rows", type=positive_int, default=4, metavar="N", help="pictures of each class in the grid (4)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        run_stages(parse_arguments(arguments), PhotoRun, STAGES)


if __name__ == "__main__":
    main()
