"""A page for the browser that edits pictures with HiDream-E1 and draws with Stable Diffusion 2.1."""
