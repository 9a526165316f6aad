"""Image sizes, pixels and latents, and grids of images to look at."""
