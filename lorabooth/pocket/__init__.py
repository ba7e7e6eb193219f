"""The pocket base: a small Stable Diffusion pipeline and the rendered world it was trained on."""
