"""A VQModel as a codec: nearest codes, diffusers' own decoding, the same hash as its folder."""

import pytest
import torch
from diffusers import VQModel

from megafusion.errors import UserError
from megafusion.images.autoencoder import encode
from megafusion.images.codec import ImageCodec, QuantizedCodec
from tests.support.quantized import CODEBOOK_SIZE

PIXELS = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
PIXELS = PIXELS.repeat_interleave(8, 2).repeat_interleave(8, 3)


@pytest.fixture(scope="module")
def codec(vq_folder) -> QuantizedCodec:
    codec = ImageCodec.from_pretrained(vq_folder)
    assert isinstance(codec, QuantizedCodec)
    return codec


def test_codes_are_the_nearest_vectors(codec):
    codes = codec.encode(PIXELS)
    latents = encode(codec.model, PIXELS).latents
    distances = (latents[:, None] - codec.model.quantize.embedding.weight[:, :, None, None]).square().sum(2)
    # By their distances: of two that are nearly as near, rounding chooses, and differs from CPU to CPU.
    chosen = distances.gather(1, codes[:, None])[:, 0]
    torch.testing.assert_close(chosen, distances.amin(1), rtol=1e-4, atol=1e-6)
    assert codes.shape == (6, 4, 4)
    assert len(codes.unique()) > CODEBOOK_SIZE // 4
    assert (codec.codebook_size, codec.latent_channels, codec.downsampling) == (CODEBOOK_SIZE, 0, 8)


def test_sliced_decoding_gives_the_same(codec):
    codes = codec.encode(PIXELS)
    together = codec.decode(codes)
    codec.use_slicing = True
    torch.testing.assert_close(codec.decode(codes), together)
    codec.use_slicing = False


def test_a_saved_model_is_the_same_codec(codec, vq_folder):
    model = VQModel.from_pretrained(vq_folder)
    again = ImageCodec.of(model)
    assert again.hash == codec.hash == ImageCodec.from_pretrained(vq_folder).hash
    torch.testing.assert_close(again.encode(PIXELS), codec.encode(PIXELS))
    with torch.no_grad():
        model.quantize.embedding.weight[7] += 1e-3
    assert ImageCodec.of(model).hash != codec.hash


@pytest.mark.parametrize("options", [{}, {"norm_type": "spatial"}, {"lookup_from_codebook": True}])
def test_decoding_is_that_of_diffusers(options):
    torch.manual_seed(1)
    model = VQModel(
        num_vq_embeddings=16, block_out_channels=(32, 32), norm_num_groups=32, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **options,
    )  # fmt: skip
    codec = ImageCodec.of(model)
    codes = torch.randint(16, (2, 4, 6))
    with torch.no_grad():
        vectors = model.quantize.get_codebook_entry(codes.flatten(), (2, 4, 6, 4))
        given = codes.flatten() if "lookup_from_codebook" in options else vectors
        expected = model.decode(given, force_not_quantize=True, shape=(2, 4, 6, 4)).sample
    torch.testing.assert_close(codec.decode(codes), expected.clamp(-1, 1))
    assert [image.size for image in codec.decode_images(codes)] == [(12, 8)] * 2


def test_half_precision_measures_distances_in_float32(vq_folder):
    half = ImageCodec.from_pretrained(vq_folder)
    half.model.to(torch.bfloat16)
    found = encode(half.model, PIXELS.bfloat16())
    vectors = half.model.quantize.embedding.weight.float()[:, :, None, None]
    distances = (found.latents.float()[:, None] - vectors).square().sum(2)
    torch.testing.assert_close(half.encode(PIXELS), distances.argmin(1))
    assert half.decode(found.codes).shape == PIXELS.shape


@pytest.mark.parametrize("code", [-1, CODEBOOK_SIZE])
def test_codes_beyond_the_codebook_are_refused(codec, code):
    codes = torch.zeros(1, 4, 4, dtype=torch.int64)
    codes[0, 2, 1] = code
    with pytest.raises(
        UserError, match=rf"codes from .*{code}.*, but the codebook has {CODEBOOK_SIZE}; give"
    ):
        codec.decode(codes)
