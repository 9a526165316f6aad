"""Pixels of a batch become latents: exactly in float32, all rows together in bf16."""

import pytest
import torch

from megafusion.images.codec import ImageCodec
from megafusion.sequence.packing import PackedBatch
from megafusion.train import image_encoder
from megafusion.train.image_encoder import ImageEncoder

SIZES = ((8, 8), (4, 8))
"""Of latents, a fourth of the pixels' along a side."""


def batch(num_rows: int = 3, num_slots: int = 4) -> PackedBatch:
    """Rows of which the first two mix sizes, latents and pixels, and the last has no image."""
    random = torch.Generator().manual_seed(0)
    shape = (num_rows, num_slots)
    fields = dict.fromkeys(PackedBatch.__dataclass_fields__, torch.zeros(num_rows, 1))
    return PackedBatch(
        **fields
        | {
            "latents": torch.randn(*shape, 4, 8, 8, generator=random),
            "image_size": torch.tensor([[0, 1, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0]]),
            "pixels": torch.randint(0, 256, (*shape, 3, 32, 32), generator=random, dtype=torch.uint8),
            "has_pixels": torch.tensor([[True, True, False, True], [True, False, True, True], [False] * 4]),
        }
    )


def expected(codec: ImageCodec, before: PackedBatch, row: int, slot: int) -> torch.Tensor:
    """An image's latents by its own encoding; those that it had where it is none of pixels."""
    latents = before.latents[row, slot].clone()
    if before.has_pixels[row, slot]:
        height, width = SIZES[before.image_size[row, slot]]
        pixels = before.pixels[row, slot, :, : 4 * height, : 4 * width]
        mean, log_variance = codec.encode(pixels[None].float() / 127.5 - 1)
        sample = mean[0] + latents[:, :height, :width] * torch.exp(0.5 * log_variance[0])
        latents[:, :height, :width] = codec.normalize(sample)
    return latents


@pytest.mark.parametrize(
    ("dtype", "pixels_at_once", "tolerance"),
    [(torch.float32, 1, 1e-5), (torch.bfloat16, 2**21, 0.05), (torch.bfloat16, 3 * 32 * 32, 0.05)],
)
def test_each_image_has_its_own_latents(codec, monkeypatch, dtype, pixels_at_once, tolerance):
    monkeypatch.setattr(image_encoder, "PIXELS_AT_ONCE", pixels_at_once)
    before = batch()
    (after,) = ImageEncoder(codec, SIZES, "cpu", dtype).encode([before])
    assert torch.equal(before.latents, batch().latents)
    assert after.latents.dtype == torch.float32
    assert not after.pixels.numel()
    assert not after.has_pixels.any()
    for row in range(3):
        for slot in range(4):
            wanted = expected(codec, before, row, slot)
            error = (after.latents[row, slot] - wanted).norm() / wanted.norm()
            assert error < tolerance, (row, slot)


def test_in_float32_a_row_has_the_same_bits_in_any_batch(codec):
    whole, encoder = batch(), ImageEncoder(codec, SIZES, "cpu")
    (together,) = encoder.encode([whole])
    for row in range(3):
        alone = PackedBatch(**{n: t[row : row + 1] for n, t in vars(whole).items()})
        (encoded,) = encoder.encode([alone])
        assert torch.equal(encoded.latents[0], together.latents[row])


def test_in_bf16_images_of_all_rows_are_encoded_together(codec, monkeypatch):
    numbers = []
    encode = ImageCodec.encode

    def record(self, pixels):
        numbers.append(tuple(pixels.shape[::2]))
        return encode(self, pixels)

    monkeypatch.setattr(ImageCodec, "encode", record)
    ImageEncoder(codec, SIZES, "cpu", torch.bfloat16).encode([batch()])
    assert numbers == [(3, 32), (3, 16)]
    numbers.clear()
    ImageEncoder(codec, SIZES, "cpu").encode([batch()])
    assert numbers == [(2, 32), (1, 16), (1, 32), (2, 16)]


def test_the_encoder_reads_nothing_from_the_device(codec):
    """Tensors of the meta device have no values: reading one raises. The step counts targets on the host."""
    before = batch()
    (after,) = ImageEncoder(codec, SIZES, "meta", torch.bfloat16).encode([before])
    assert after.latents.is_meta
    assert after.latents.shape == before.latents.shape
    assert not any(tensor.is_meta for name, tensor in vars(after).items() if name != "latents")
