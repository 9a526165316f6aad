"""Latents of the pictures in a batch, made on the device that trains on them."""

import copy
from dataclasses import replace

import torch

from megafusion.autoencoder.codec import ImageCodec
from megafusion.sequence.packing import PackedBatch
from megafusion.train.engine import Engine


class PictureEncoder:
    """Encodes the pictures of a batch; the codec is copied to the device only if there are any."""

    def __init__(self, codec: ImageCodec, engine: Engine):
        self._codec, self._device = codec, engine.device
        self._on_device: ImageCodec | None = None

    def encode(self, micro_batches: list[PackedBatch]) -> list[PackedBatch]:
        """The batches with a sample of each picture's latents, normalised, in place of the picture."""
        return [self._encode(batch) if batch.pictures.numel() else batch for batch in micro_batches]

    def _encode(self, batch: PackedBatch) -> PackedBatch:
        """A row at a time: what a convolution gives depends, in its last bits, on what else it is given, and
        rows are the same at any topology."""
        if self._on_device is None:
            self._on_device = ImageCodec(copy.deepcopy(self._codec.model).to(self._device))
        batch = batch.to(self._device)
        latents = batch.latents.clone()
        for row, has_picture in enumerate(batch.has_picture):
            if has_picture.any():
                pictures = batch.pictures[row, has_picture].float() / 127.5 - 1
                mean, log_variance = self._on_device.encode(pictures)
                sample = mean + latents[row, has_picture] * torch.exp(0.5 * log_variance)
                latents[row, has_picture] = self._on_device.normalize(sample)
        empty = batch.pictures[..., :0, :0]
        return replace(batch, latents=latents, pictures=empty, has_picture=batch.has_picture & False)
