"""Images outside the model: sizes, pixels, and the autoencoder that turns them into latents."""
