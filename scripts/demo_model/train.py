"""Train the demo model: Stable Diffusion 2.1-base in small, from nothing, on scenes it renders itself.

    python scripts/demo_model/train.py

The stages run in order, each from what the ones before left in --work_dir:

    tokenizer   learn a BPE vocabulary from the captions
    vae         learn to squeeze 128x128 pictures into 4x16x16 latents and back
    latents     encode the training pictures once, so that the UNet never waits for the VAE
    decoder     teach the VAE's decoder to draw clean shapes from slightly wrong latents
    text        teach the text encoder to tell what stands where, as CLIP learns before Stable Diffusion does
    unet        learn to predict the noise in a latent, given the frozen text encoder's view of its caption
    export      write the float16 folder that StableDiffusionPipeline.from_pretrained loads

Stop it any time: the same command goes on from the last checkpoint, and ends at the weights an uninterrupted run ends
at, because each step draws its data from the seed and its own number alone.
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
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from diffusers import StableDiffusionPipeline

from runners.cli import ArgumentParser, one_line_errors, positive_int
from scripts.demo_model.networks import (
    SceneReader,
    build_scheduler,
    build_text_encoder,
    build_unet,
    build_vae,
    train_tokenizer,
)
from scripts.demo_model.scenes import (
    BACKGROUNDS,
    IMAGE_SIZE,
    POSITIONS,
    Scene,
    held_out_scenes,
    sample_scene,
    score_image,
)
from scripts.demo_model.stages import (
    CAPTION_DROPOUT,
    Run,
    add_run_arguments,
    assemble,
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

DEMO_MODEL = ROOT / "examples/sd2.1/demo_model"
MIN_SNR_GAMMA = 5.0
CLOSE_UP_SHARE = 0.85  # of the VAE's steps
SHAPE_WEIGHT = 4.0  # extra weight of the pixels of shapes: they are a twentieth of a picture, and all that is scored
LATENT_NOISE = 0.2  # up to which the decoder learns to see through; the latents themselves have a size of about 0.7
PREVIEW_STEPS = 20
STEPS_AND_BATCHES = {"vae": (2200, 8), "decoder": (2000, 8), "text": (600, 64), "unet": (5000, 16)}
GUIDANCE_SCALE = 1.5  # so small a model draws worse pictures with stronger guidance


@dataclass(frozen=True)
class SceneRun(Run):
    """What the stages share."""

    scenes: int
    vae_steps: int
    decoder_steps: int
    text_steps: int
    unet_steps: int
    vae_batch: int
    decoder_batch: int
    text_batch: int
    unet_batch: int
    preview_pictures: int

    def training_scene(self, index: int) -> tuple[Scene, random.Random]:
        """A scene of the UNet's training set, and the rng to render it with."""
        rng = random.Random(f"{self.seed}/scene/{index}")
        return sample_scene(rng), rng


def run_tokenizer(run: SceneRun) -> None:
    rng = run.rng("tokenizer", 0)
    train_tokenizer(sample_scene(rng).caption(rng) for _ in range(2000)).save_pretrained(run.work_dir / "tokenizer")


def run_vae(run: SceneRun) -> None:
    run.rng("vae", -1)
    vae = start_with_clean_latents(build_vae()).to(run.device)
    test_scenes = held_out_scenes(run.preview_pictures, run.seed)
    test_pictures = [scene.render() for scene in test_scenes]

    def loss(step: int) -> Tensor:
        close_up = step < CLOSE_UP_SHARE * run.vae_steps
        rng = run.rng("vae", step)
        pictures, shapes = render_batch([(sample_scene(rng), rng) for _ in range(run.vae_batch)], run.device, close_up)
        posterior = vae.encode(pictures).latent_dist
        error = reconstruction_error(vae.decode(posterior.sample()).sample - pictures, shapes)
        return error + latent_penalty(posterior, pictures)

    @torch.no_grad()
    def preview(step: int) -> None:
        pictures = to_images(vae.decode(vae.encode(to_tensor(test_pictures, run.device)).latent_dist.mode()).sample)
        save_grid(pictures, run.work_dir / "vae.png")
        report("vae", step, pictures, test_scenes)

    fit(vae, loss, run.vae_steps, 2e-3, run.work_dir / "vae.pt", run.save_every, preview)
    run.save(vae, "vae")


def run_latents(run: SceneRun) -> None:
    vae = run.load(build_vae(), "vae")

    def picture(index: int) -> np.ndarray:
        scene, rng = run.training_scene(index)
        return scene.render(rng)

    cache_latents(run, vae, picture, run.scenes)


def run_decoder(run: SceneRun) -> None:
    """Teach the decoder to forgive errors like a UNet's. The encoder stays, and with it the latents."""
    vae = run.load(build_vae(), "vae")
    cache = run.load_latents()
    run.rng("decoder", -1)
    decoder = nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder}).requires_grad_(True)
    test_scenes = held_out_scenes(run.preview_pictures, run.seed)
    with torch.no_grad():
        test_pictures = to_tensor([scene.render() for scene in test_scenes], run.device)
        test_latents = vae.encode(test_pictures).latent_dist.mode()

    def loss(step: int) -> Tensor:
        rng = run.rng("decoder", step)
        chosen = rng.choices(range(len(cache["latents"])), k=run.decoder_batch)
        pictures, shapes = render_batch([run.training_scene(index) for index in chosen], run.device)
        noise = torch.randn(run.decoder_batch, *cache["latents"].shape[1:])
        level = LATENT_NOISE * torch.rand(run.decoder_batch, 1, 1, 1)
        latents = (cache["latents"][chosen] + level * noise).to(run.device)
        return reconstruction_error(vae.decode(latents).sample - pictures, shapes)

    @torch.no_grad()
    def preview(step: int) -> None:
        noise = torch.randn(test_latents.shape, generator=torch.Generator().manual_seed(run.seed)).to(run.device)
        pictures = to_images(vae.decode(test_latents + LATENT_NOISE / 2 * noise).sample)
        save_grid(pictures, run.work_dir / "decoder.png")
        report("decoder", step, pictures, test_scenes)

    fit(decoder, loss, run.decoder_steps, 1e-3, run.work_dir / "decoder.pt", run.save_every, preview)
    run.save(vae, "decoder")


def run_text(run: SceneRun) -> None:
    tokenizer = run.load_tokenizer()
    run.rng("text", -1)
    networks = nn.ModuleDict({"encoder": build_text_encoder(tokenizer), "reader": SceneReader()}).to(run.device)

    def loss(step: int) -> Tensor:
        rng = run.rng("text", step)
        scenes = [sample_scene(rng) for _ in range(run.text_batch)]
        tokens = tokenize(tokenizer, [scene.caption(rng) for scene in scenes]).to(run.device)
        return networks["reader"](networks["encoder"](tokens).last_hidden_state, scenes)

    fit(networks, loss, run.text_steps, 1e-3, run.work_dir / "text.pt", run.save_every)
    run.save(networks["encoder"], "text")


def run_unet(run: SceneRun) -> None:
    tokenizer = run.load_tokenizer()
    text_encoder = run.load(build_text_encoder(tokenizer), "text")
    vae = run.load(build_vae(), "decoder")
    cache = run.load_latents()
    latents = cache["latents"] * cache["scaling_factor"]
    scenes = [run.training_scene(index)[0] for index in range(len(latents))]
    noise_schedule = build_scheduler()
    run.rng("unet", -1)
    unet = build_unet().to(run.device)

    def loss(step: int) -> Tensor:
        rng = run.rng("unet", step)
        chosen = rng.choices(range(len(scenes)), k=run.unet_batch)
        captions = ["" if rng.random() < CAPTION_DROPOUT else scenes[i].caption(rng) for i in chosen]
        with torch.no_grad():
            text = text_encoder(tokenize(tokenizer, captions).to(run.device)).last_hidden_state
        return denoising_loss(unet, latents[chosen], text, noise_schedule, MIN_SNR_GAMMA)

    vae.register_to_config(scaling_factor=cache["scaling_factor"])
    pipeline = assemble(vae, text_encoder, tokenizer, unet, build_scheduler())
    fit(
        unet,
        loss,
        run.unet_steps,
        1e-3,
        run.work_dir / "unet.pt",
        run.save_every,
        lambda step: preview(run, pipeline, step),
    )
    run.save(unet, "unet")


def preview(run: SceneRun, pipeline: StableDiffusionPipeline, step: int) -> None:
    """Draw held-out scenes with the weights so far, write the pictures to the work folder and print their scores."""
    scenes = held_out_scenes(run.preview_pictures, run.seed)
    pictures = draw_pictures(
        pipeline,
        [scene.caption() for scene in scenes],
        run.seed,
        num_inference_steps=PREVIEW_STEPS,
        guidance_scale=GUIDANCE_SCALE,
    )
    save_grid(pictures, run.work_dir / "unet.png")
    report("unet", step, pictures, scenes)


def render_batch(
    scenes: Sequence[tuple[Scene, random.Random]], device: torch.device, close_up: bool = False
) -> tuple[Tensor, Tensor]:
    """Pictures [count, 3, size, size] of scenes, and 1 where they show a shape [count, 1, size, size].

    A close-up is a quarter of a picture around one of its shapes: most of what there is to learn, for a quarter of
    the work. GroupNorm sees other statistics there, so the last steps of the training have to be on whole pictures.
    """
    pictures, shapes = [], []
    for scene, rng in scenes:
        picture = scene.render(rng)
        if close_up:
            size = IMAGE_SIZE // 2
            left, top = (
                min(max(middle + rng.randint(-12, 12) - size // 2, 0), size)
                for middle in POSITIONS[rng.choice(scene.shapes).position]
            )
            picture = picture[top : top + size, left : left + size]
        pictures.append(picture)
        shapes.append((picture != BACKGROUNDS[scene.background]).any(axis=-1))
    return to_tensor(pictures, device), torch.from_numpy(np.stack(shapes)).unsqueeze(1).to(device)


def reconstruction_error(difference: Tensor, shapes: Tensor) -> Tensor:
    """The mean error of decoded pictures, as a scalar. Takes [count, 3, h, w], and `shapes` of `render_batch`."""
    return ((1 + SHAPE_WEIGHT * shapes) * (difference.abs() + difference.square())).mean()


def report(stage: str, step: int, pictures: np.ndarray, scenes: Sequence[Scene]) -> None:
    scores = [score_image(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    shares = {
        name: np.mean([getattr(score, name) for score in scores]) for name in ("colour", "shape", "position", "all")
    }
    tqdm.write(f"{stage} step {step}: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))


def run_export(run: SceneRun) -> None:
    pipeline = load_parts(run, "decoder", build_scheduler())
    run.load(pipeline.unet, "unet")
    export(pipeline, run.output_dir, GUIDANCE_SCALE)


STAGES: dict[str, Callable[[SceneRun], None]] = {
    "tokenizer": run_tokenizer,
    "vae": run_vae,
    "latents": run_latents,
    "decoder": run_decoder,
    "text": run_text,
    "unet": run_unet,
    "export": run_export,
}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, STAGES, DEMO_MODEL, Path("outputs/demo_training"), STEPS_AND_BATCHES)
    add = parser.add_argument
    add("--scenes", type=positive_int, default=12_000, metavar="N", help="training pictures for the UNet (12000)")
    add(
        "--preview_pictures",
        type=positive_int,
        default=32,
        metavar="N",
        help="drawn and scored at each checkpoint (32)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        run_stages(parse_arguments(arguments), SceneRun, STAGES)


if __name__ == "__main__":
    main()
