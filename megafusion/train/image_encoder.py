"""Latents of the images of a batch that are kept as pixels, computed on the training device."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megafusion.images.codec import ImageCodec
from megafusion.images.sizes import Size
from megafusion.sequence.packing import PackedBatch
from megafusion.train.vision_features import VisionFeatures

PIXELS_AT_ONCE = 2**21
"""That are encoded together, 32 images of 256 x 256: more would need gigabytes and be no faster."""


class ImageEncoder:
    """Encodes the pixels of a batch, with a copy of the codec on the device. sizes: of latents.

    In float32 a row at a time: the last bits of a convolution depend on how many images it takes, and rows
    are the same at every topology. In another dtype the images of all rows together, several times as fast.
    vision: gives each image's features at patches of patch_size, from the same pixels.
    """

    def __init__(
        self,
        codec: ImageCodec,
        sizes: Sequence[Size],
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        patch_size: int = 1,
        vision: VisionFeatures | None = None,
    ):
        self._codec, self._sizes, self._device, self._dtype = codec, sizes, torch.device(device), dtype
        self._patch_size, self._vision = patch_size, vision
        self._is_exact = dtype == torch.float32
        self._on_device: ImageCodec | None = None

    def encode(self, micro_batches: list[PackedBatch], with_features: bool = True) -> list[PackedBatch]:
        """The batches with a sample of each image's normalized latents in place of its pixels."""
        vision = self._vision if with_features else None
        return [self._encode(batch, vision) if batch.pixels.numel() else batch for batch in micro_batches]

    def _encode(self, batch: PackedBatch, vision: VisionFeatures | None) -> PackedBatch:
        if self._on_device is None:
            model = copy.deepcopy(self._codec.model).to(self._device, self._dtype)
            if not self._is_exact:
                model = model.to(memory_format=torch.channels_last)  # as tensor cores compute convolutions
            self._on_device = ImageCodec(model)
        groups = [(size, self._send(slots)) for size, slots in self._groups(batch)]
        # The rest of the batch stays on the host, which reads its counts.
        latents = batch.latents.to(self._device, non_blocking=True, copy=True)
        pixels = batch.pixels.to(self._device, non_blocking=True).flatten(0, 1)
        flat, factor = latents.flatten(0, 1), self._on_device.downsampling
        features = self._no_features(batch, vision)
        for (height, width), slots in groups:
            shown = pixels[slots, :, : height * factor, : width * factor]
            mean, log_variance = self._on_device.encode(shown.float() / 127.5 - 1)
            noise = flat[slots, :, :height, :width]
            sample = mean + noise * torch.exp(0.5 * log_variance)
            flat[slots, :, :height, :width] = self._on_device.normalize(sample)
            if vision:
                found = vision.at_patches(shown, (height // self._patch_size, width // self._patch_size))
                features.flatten(0, 1)[slots, : found.shape[1]] = found
        empty = batch.pixels[..., :0, :0]
        none = torch.zeros_like(batch.has_pixels)
        return replace(batch, latents=latents, pixels=empty, has_pixels=none, features=features)

    def _no_features(self, batch: PackedBatch, vision: VisionFeatures | None) -> Tensor:
        """Features of images that have none, where there is a vision model."""
        if vision is None:
            return batch.features
        num_patches = max(height * width for height, width in self._sizes) // self._patch_size**2
        return torch.zeros(*batch.has_pixels.shape, num_patches, vision.size, device=self._device)

    def _groups(self, batch: PackedBatch) -> Iterator[tuple[Size, Tensor]]:
        """Images that are encoded together: their size as latents, and their indices among B x N slots.

        They are found on the host, where the batch still is, so that no GPU is waited for.
        """
        sizes_BN = torch.where(batch.has_pixels, batch.image_size, -1)
        for row, sizes in enumerate(sizes_BN if self._is_exact else sizes_BN.view(1, -1)):
            for number, (height, width) in enumerate(self._sizes):
                slots = row * len(sizes) + (sizes == number).nonzero().flatten()
                num_pixels = height * width * self._codec.downsampling**2
                num_images = len(sizes) if self._is_exact else max(1, PIXELS_AT_ONCE // num_pixels)
                yield from (((height, width), some) for some in slots.split(num_images) if len(some))

    def _send(self, slots: Tensor) -> Tensor:
        if self._device.type == "cuda":
            slots = slots.pin_memory()
        return slots.to(self._device, non_blocking=True)
