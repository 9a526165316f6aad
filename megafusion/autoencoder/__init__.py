"""The image autoencoder: pictures to VAE latents and back, and how to train one."""

from megafusion.autoencoder.codec import ImageCodec, to_pil, to_rgb, to_tensor

__all__ = ["ImageCodec", "to_pil", "to_rgb", "to_tensor"]
