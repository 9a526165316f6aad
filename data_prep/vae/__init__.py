"""The small committed autoencoder, and the training of diffusers AutoencoderKLs."""
