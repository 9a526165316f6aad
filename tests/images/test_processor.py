"""PIL images to pixels and back: modes, transparency, EXIF rotation, crops."""

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from megafusion.images.processor import postprocess_images, preprocess_images


def pixel(tensor, x: int, y: int) -> list[int]:
    return [round((float(v) + 1) * 127.5) for v in tensor[0, :, y, x]]


def test_transparency_becomes_white():
    image = Image.new("RGBA", (8, 8), (0, 0, 255, 128))
    assert pixel(preprocess_images([image], 8, 8), 3, 3) == [127, 127, 255]
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0])
    palette.info["transparency"] = 0
    assert pixel(preprocess_images([palette], 8, 8), 3, 3) == [255, 255, 255]
    assert pixel(preprocess_images([Image.new("LA", (8, 8), (0, 0))], 8, 8), 3, 3) == [255, 255, 255]


def test_other_modes():
    assert pixel(preprocess_images([Image.new("CMYK", (8, 8), (0, 255, 255, 0))], 8, 8), 0, 0) == [255, 0, 0]
    assert pixel(preprocess_images([Image.new("L", (8, 8), 90)], 8, 8), 0, 0) == [90, 90, 90]
    assert pixel(preprocess_images([Image.new("1", (8, 8), 1)], 8, 8), 0, 0) == [255, 255, 255]
    sixteen = Image.fromarray(np.full((8, 8), 0x8000, dtype=np.uint16))
    assert pixel(preprocess_images([sixteen], 8, 8), 0, 0) == [128, 128, 128]


def test_exif_rotation_and_centre_crop():
    image = Image.new("RGB", (8, 8), "black")
    image.putpixel((0, 0), (255, 255, 255))
    image.getexif()[0x0112] = 6  # rotate 90 degrees clockwise
    image.info["exif"] = image.getexif().tobytes()
    assert pixel(preprocess_images([image], 8, 8), 7, 0) == [255, 255, 255]
    wide = Image.new("RGB", (32, 8), "red")
    wide.paste("blue", (12, 0, 20, 8))
    assert pixel(preprocess_images([wide], 8, 8), 4, 4) == [0, 0, 255]
    assert preprocess_images([wide, image], 4, 8).shape == (2, 3, 4, 8)


def test_pixels_round_trip_to_the_same_image():
    array = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    originals = [Image.fromarray(a) for a in array]
    back = postprocess_images(preprocess_images(originals, 8, 8))
    assert all(np.array_equal(np.asarray(b), a) for a, b in zip(array, back, strict=True))
    assert (
        F.mse_loss(
            preprocess_images(postprocess_images(torch.full((1, 3, 4, 4), 9.0)), 4, 4), torch.ones(1, 3, 4, 4)
        )
        == 0
    )
