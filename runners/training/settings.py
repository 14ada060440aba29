"""What a training is to do, and which of it decides the weights that come out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Layers that get an adapter, by the ends of their names in a UNet of diffusers.
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TRANSFORMER = (*_ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
LORA_LAYERS = {
    "attention": _ATTENTION,
    "transformer": _TRANSFORMER,
    "all": (*_TRANSFORMER, "conv1", "conv2", "conv_shortcut", "time_emb_proj"),
}


@dataclass(frozen=True)
class Settings:
    """See `arguments.py`, which says what each is for."""

    model_path: Path
    data: Path
    output_dir: Path
    cache_dir: Path
    caption_column: str
    image_column: str
    device: str | None
    precision: str | None
    preset: str
    switches: dict[str, bool]
    steps: int
    batch_size: int
    gradient_accumulation: int
    full: bool
    lora_rank: int
    lora_alpha: int
    lora_layers: str
    learning_rate: float
    lr_schedule: str
    warmup_steps: int
    weight_decay: float
    max_norm: float
    ema_decay: float
    resolution: int | None
    aspect_ratio_buckets: bool
    random_flip: bool
    caption_dropout: float
    snr_gamma: float | None
    noise_offset: float
    prediction_type: str | None
    seed: int
    validation_prompts: tuple[str, ...]
    validation_every: int
    validation_steps: int
    guidance_scale: float
    checkpoint_every: int
    keep_checkpoints: int
    log_every: int
    resume: bool

    def decisive(self, world_size: int) -> dict[str, Any]:
        """What the weights depend on beside model and data, in words that JSON keeps.

        Batches are named by all examples of an optimizer's step: how devices and accumulation share them does not
        change which these are.
        """
        names = (
            "steps",
            "full",
            "learning_rate",
            "lr_schedule",
            "warmup_steps",
            "weight_decay",
            "max_norm",
            "ema_decay",
            "resolution",
            "aspect_ratio_buckets",
            "random_flip",
            "caption_dropout",
            "snr_gamma",
            "noise_offset",
            "prediction_type",
            "seed",
            "precision",
            "preset",
            "switches",
        )
        lora = () if self.full else ("lora_rank", "lora_alpha", "lora_layers")
        values = asdict(self)
        return {name: values[name] for name in (*names, *lora)} | {"examples_a_step": self.examples_a_step(world_size)}

    def examples_a_step(self, world_size: int) -> int:
        """How many pictures all devices together see before the optimizer moves."""
        return self.batch_size * self.gradient_accumulation * world_size
