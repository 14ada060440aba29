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
import os
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

from ascend.device import DeviceManager
from ascend.memory import keep_freed_memory
from runners.cli import ArgumentParser, UserError, file_path, non_negative_int, one_line_errors, positive_int
from runners.files import make_output_dir, write_json
from runners.model_dir import DEFAULTS
from runners.training.objective import add_noise, levels, weighted_error
from scripts.demo_model.networks import (
    TEXT_LENGTH,
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
from scripts.demo_model.training import fit, save_grid, save_tensors

Model = TypeVar("Model", bound=torch.nn.Module)
DEMO_MODEL = ROOT / "examples/sd2.1/demo_model"
CAPTION_DROPOUT = 0.1  # share of captions replaced by the empty one, which classifier-free guidance subtracts
MIN_SNR_GAMMA = 5.0
CLOSE_UP_SHARE = 0.85  # of the VAE's steps
INITIAL_LOGVAR = -6.0  # start with nearly no noise in the latents
THUMBNAIL_WEIGHT = 5.0  # of the rule that three latent channels hold the picture, reduced eight times
SHAPE_WEIGHT = 4.0  # extra weight of the pixels of shapes: they are a twentieth of a picture, and all that is scored
KL_WEIGHT = 1e-3  # per latent number
LATENT_NOISE = 0.2  # up to which the decoder learns to see through; the latents themselves have a size of about 0.7
PREVIEW_STEPS = 20
GUIDANCE_SCALE = 1.5  # so small a model draws worse pictures with stronger guidance


@dataclass(frozen=True)
class Run:
    """What the stages share."""

    work_dir: Path
    output_dir: Path
    device: torch.device
    seed: int
    scenes: int
    vae_steps: int
    decoder_steps: int
    text_steps: int
    unet_steps: int
    vae_batch: int
    decoder_batch: int
    text_batch: int
    unet_batch: int
    save_every: int
    preview_pictures: int

    def rng(self, stage: str, step: int) -> random.Random:
        """The only source of chance in a step of a stage. Also seeds torch, whose generators draw the noise."""
        rng = random.Random(f"{self.seed}/{stage}/{step}")
        torch.manual_seed(rng.getrandbits(63))
        return rng

    def training_scene(self, index: int) -> tuple[Scene, random.Random]:
        """A scene of the UNet's training set, and the rng to render it with."""
        rng = random.Random(f"{self.seed}/scene/{index}")
        return sample_scene(rng), rng

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

    def save(self, model: torch.nn.Module, stage: str) -> None:
        temporary = self.work_dir / f"{stage}.safetensors.tmp"
        save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, temporary)
        os.replace(temporary, self.work_dir / f"{stage}.safetensors")


def to_tensor(images: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """uint8 pictures [128, 128, 3] as one float tensor [count, 3, 128, 128] in -1 to 1."""
    return torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(tensor: Tensor) -> np.ndarray:
    """The reverse of `to_tensor`, as one array [count, 128, 128, 3]."""
    return ((tensor.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def run_tokenizer(run: Run) -> None:
    rng = run.rng("tokenizer", 0)
    train_tokenizer(sample_scene(rng).caption(rng) for _ in range(2000)).save_pretrained(run.work_dir / "tokenizer")


def run_vae(run: Run) -> None:
    run.rng("vae", -1)
    vae = build_vae().to(run.device)
    nn.init.constant_(vae.quant_conv.bias[4:], INITIAL_LOGVAR)
    test_scenes = held_out_scenes(run.preview_pictures, run.seed)
    test_pictures = [scene.render() for scene in test_scenes]

    def loss(step: int) -> Tensor:
        close_up = step < CLOSE_UP_SHARE * run.vae_steps
        rng = run.rng("vae", step)
        pictures, shapes = render_batch([(sample_scene(rng), rng) for _ in range(run.vae_batch)], run.device, close_up)
        posterior = vae.encode(pictures).latent_dist
        error = reconstruction_error(vae.decode(posterior.sample()).sample - pictures, shapes)
        # Without this rule the encoder takes thousands of steps to tell yellow from orange.
        thumbnail_error = (posterior.mean[:, :3] - F.avg_pool2d(pictures, 8)).square().mean()
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return error + THUMBNAIL_WEIGHT * thumbnail_error + KL_WEIGHT * divergence

    @torch.no_grad()
    def preview(step: int) -> None:
        pictures = to_images(vae.decode(vae.encode(to_tensor(test_pictures, run.device)).latent_dist.mode()).sample)
        save_grid(pictures, run.work_dir / "vae.png")
        report("vae", step, pictures, test_scenes)

    fit(vae, loss, run.vae_steps, 2e-3, run.work_dir / "vae.pt", run.save_every, preview)
    run.save(vae, "vae")


def run_latents(run: Run) -> None:
    vae = run.load(build_vae(), "vae")
    chunks = []
    for start in tqdm(range(0, run.scenes, 64), desc="latents", unit="batch"):
        pictures = []
        for index in range(start, min(start + 64, run.scenes)):
            scene, rng = run.training_scene(index)
            pictures.append(scene.render(rng))
        with torch.no_grad():
            chunks.append(vae.encode(to_tensor(pictures, run.device)).latent_dist.mode().cpu())
    latents = torch.cat(chunks)
    save_tensors({"latents": latents, "scaling_factor": 1 / latents.std().item()}, run.work_dir / "latents.pt")


def run_decoder(run: Run) -> None:
    """Teach the decoder to forgive errors like a UNet's. The encoder stays, and with it the latents."""
    vae = run.load(build_vae(), "vae")
    cache = torch.load(run.need("latents.pt", "latents"), weights_only=True)
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


def run_text(run: Run) -> None:
    tokenizer = load_tokenizer(run)
    run.rng("text", -1)
    networks = nn.ModuleDict({"encoder": build_text_encoder(tokenizer), "reader": SceneReader()}).to(run.device)

    def loss(step: int) -> Tensor:
        rng = run.rng("text", step)
        scenes = [sample_scene(rng) for _ in range(run.text_batch)]
        tokens = tokenize(tokenizer, [scene.caption(rng) for scene in scenes]).to(run.device)
        return networks["reader"](networks["encoder"](tokens).last_hidden_state, scenes)

    fit(networks, loss, run.text_steps, 1e-3, run.work_dir / "text.pt", run.save_every)
    run.save(networks["encoder"], "text")


def run_unet(run: Run) -> None:
    tokenizer = load_tokenizer(run)
    text_encoder = run.load(build_text_encoder(tokenizer), "text")
    vae = run.load(build_vae(), "decoder")
    cache = torch.load(run.need("latents.pt", "latents"), weights_only=True)
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
        noise = torch.randn(run.unet_batch, *latents.shape[1:])
        timesteps = torch.randint(0, noise_schedule.config.num_train_timesteps, (run.unet_batch,))
        at = levels(noise_schedule.alphas_cumprod, timesteps, "epsilon", MIN_SNR_GAMMA)
        noisy = add_noise(latents[chosen], noise, at)
        predicted = unet(noisy.to(run.device), timesteps.to(run.device), text).sample
        return weighted_error(predicted, noise.to(run.device), at.weight.to(run.device))

    vae.register_to_config(scaling_factor=cache["scaling_factor"])
    pipeline = assemble(vae, text_encoder, tokenizer, unet)
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


def preview(run: Run, pipeline: StableDiffusionPipeline, step: int) -> None:
    """Draw held-out scenes with the weights so far, write the pictures to the work folder and print their scores."""
    scenes = held_out_scenes(run.preview_pictures, run.seed)
    pictures = pipeline(
        [scene.caption() for scene in scenes],
        num_inference_steps=PREVIEW_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        generator=torch.Generator().manual_seed(run.seed),
        output_type="np",
    ).images
    pictures = (pictures * 255).round().astype(np.uint8)
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


def assemble(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, build_scheduler(), None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_export(run: Run) -> None:
    tokenizer = load_tokenizer(run)
    vae = run.load(build_vae(), "decoder")
    vae.register_to_config(
        scaling_factor=torch.load(run.need("latents.pt", "latents"), weights_only=True)["scaling_factor"]
    )
    text_encoder = run.load(build_text_encoder(tokenizer), "text")
    pipeline = assemble(vae, text_encoder, tokenizer, run.load(build_unet(), "unet")).to(dtype=torch.float16)
    temporary = run.output_dir.with_name(run.output_dir.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.save_pretrained(temporary)
    tokenizer.backend_tokenizer.model.save(str(temporary / "tokenizer"))  # vocab.json and merges.txt, as in SD2.1
    write_json(temporary / DEFAULTS, {"guidance_scale": GUIDANCE_SCALE})
    shutil.rmtree(run.output_dir, ignore_errors=True)
    os.replace(temporary, run.output_dir)
    size = sum(file.stat().st_size for file in run.output_dir.rglob("*") if file.is_file())
    print(f"{run.output_dir}: {size / 1e6:.1f} MB")


def load_tokenizer(run: Run) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(run.need("tokenizer", "tokenizer"))


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Captions as the pipeline would read them, int64 [count, 77]."""
    return tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").input_ids


STAGES: dict[str, Callable[[Run], None]] = {
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
    add = parser.add_argument
    add("--stage", choices=("all", *STAGES), default="all", metavar="NAME", help="run this stage only (all)")
    add(
        "--output_dir",
        type=file_path,
        default=DEMO_MODEL,
        metavar="DIR",
        help="of the model (examples/sd2.1/demo_model)",
    )
    add(
        "--work_dir",
        type=file_path,
        default=Path("outputs/demo_training"),
        metavar="DIR",
        help="of checkpoints, latents and previews (outputs/demo_training)",
    )
    add("--device", metavar="NAME", help="npu, cuda or cpu, or one of several as npu:1 (the best there is)")
    add("--seed", type=non_negative_int, default=0, metavar="N", help="(0)")
    add("--scenes", type=positive_int, default=12_000, metavar="N", help="training pictures for the UNet (12000)")
    for stage, steps, batch in (("vae", 2200, 8), ("decoder", 2000, 8), ("text", 600, 64), ("unet", 5000, 16)):
        add(f"--{stage}_steps", type=positive_int, default=steps, metavar="N", help=f"({steps})")
        add(f"--{stage}_batch", type=positive_int, default=batch, metavar="N", help=f"examples in a step ({batch})")
    add("--save_every", type=positive_int, default=250, metavar="N", help="steps from checkpoint to checkpoint (250)")
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
        args = vars(parse_arguments(arguments))
        stage = args.pop("stage")
        keep_freed_memory()
        device, work_dir = DeviceManager(args.pop("device")).device, make_output_dir(args.pop("work_dir"))
        run = Run(device=device, work_dir=work_dir, **args)
        for name in STAGES if stage == "all" else [stage]:
            STAGES[name](run)


if __name__ == "__main__":
    main()
