"""What the runners of Stable Diffusion share: their arguments, the pipeline, and what they draw."""
