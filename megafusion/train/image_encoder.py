"""Latents of the images of a batch that are kept as pixels, computed on the training device."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch

from megafusion.images.codec import ImageCodec
from megafusion.images.sizes import Size
from megafusion.sequence.packing import PackedBatch


class ImageEncoder:
    """Encodes the pixels of a batch, with a copy of the codec on the device. sizes: of latents."""

    def __init__(self, codec: ImageCodec, sizes: Sequence[Size], device: torch.device | str):
        self._codec, self._sizes, self._device = codec, sizes, device
        self._on_device: ImageCodec | None = None

    def encode(self, micro_batches: list[PackedBatch]) -> list[PackedBatch]:
        """The batches with a sample of each image's normalized latents in place of its pixels."""
        return [self._encode(batch) if batch.pixels.numel() else batch for batch in micro_batches]

    def _encode(self, batch: PackedBatch) -> PackedBatch:
        """Encode one row and one size at a time: the last bits of a convolution depend on its batch, and rows
        are the same at every topology."""
        if self._on_device is None:
            self._on_device = ImageCodec(copy.deepcopy(self._codec.model).to(self._device))
        batch = batch.to(self._device)
        latents = batch.latents.clone()
        factor = self._on_device.downsampling
        for row, has_pixels in enumerate(batch.has_pixels):
            for number, (height, width) in enumerate(self._sizes):
                chosen = has_pixels & (batch.image_size[row] == number)
                if not chosen.any():
                    continue
                shown = batch.pixels[row, chosen, :, : height * factor, : width * factor]
                mean, log_variance = self._on_device.encode(shown.float() / 127.5 - 1)
                noise = latents[row, chosen, :, :height, :width]
                sample = mean + noise * torch.exp(0.5 * log_variance)
                latents[row, chosen, :, :height, :width] = self._on_device.normalize(sample)
        empty = batch.pixels[..., :0, :0]
        return replace(batch, latents=latents, pixels=empty, has_pixels=batch.has_pixels & False)
