"""Fine-tuning of Stable Diffusion: data, objective, checkpoints, loop."""
