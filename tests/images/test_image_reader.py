"""The reader of images: every depth and mode is scaled or refused, and no metadata make one unreadable."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from megafusion.images.reader import BadImage, check_image, convert_to_rgb, read_image
from tests.support.raw import drawing, encoded

COLOR = (200, 30, 90)


def chunk(name: bytes, content: bytes) -> bytes:
    body = name + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def png(depth: int, color_type: int, rows: list[bytes], *chunks: bytes, width: int = 2) -> bytes:
    """A PNG of any depth: Pillow writes few of them."""
    header = struct.pack(">IIBBBBB", width, len(rows), depth, color_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    middle = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(middle)


def transparent(*samples: int) -> bytes:
    return chunk(b"tRNS", struct.pack(f">{len(samples)}H", *samples))


def tiff(array: np.ndarray, bits: int, **tags: int) -> bytes:
    """A grey TIFF of samples of any type, little-endian, uncompressed."""
    height, width = array.shape
    content = array.astype(array.dtype.newbyteorder("<")).tobytes() if bits != 12 else pack_12_bits(array)
    kind = {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: tags.get("photometric", 1), 273: 8}
    entries |= {277: 1, 278: height, 279: len(content), 339: kind}
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    padded = content + b"\0" * (len(content) % 2)
    return (
        b"II*\0"
        + struct.pack("<I", 8 + len(padded))
        + padded
        + struct.pack("<H", len(entries))
        + table
        + bytes(4)
    )


def pack_12_bits(array: np.ndarray) -> bytes:
    return b"".join(
        bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in array.reshape(-1, 2).tolist()
    )


def grey(content: bytes) -> list[int]:
    red, green, blue = np.asarray(read_image(content)).reshape(-1, 3).T
    assert (red == green).all()
    assert (red == blue).all()
    return red.tolist()


@given(st.sampled_from([1, 2, 4, 8, 16]), st.integers(0, 65535), st.integers(0, 65535), st.booleans())
def test_grey_png_of_every_depth_is_scaled_and_its_transparent_value_is_white(depth, a, b, is_clear):
    a, b = a >> (16 - depth), b >> (16 - depth)
    row = struct.pack(">HH", a, b) if depth == 16 else ((a << depth | b) << 16 - 2 * depth).to_bytes(2)
    found = grey(png(depth, 0, [row[: -(-depth // 4)]], *([transparent(b)] if is_clear else [])))
    peak = 2**depth - 1
    expected = [255 if is_clear and value == b else value * 255 / peak for value in (a, b)]
    assert found == pytest.approx(expected, abs=0.5)


@given(st.lists(st.integers(0, 65535), min_size=6, max_size=6))
def test_16_bit_rgb_png_is_scaled_and_its_transparent_color_is_white(samples):
    assume([s >> 8 for s in samples[:3]] != [s >> 8 for s in samples[3:]])
    content = png(16, 2, [struct.pack(">6H", *samples)], transparent(*samples[3:]))
    first, second = np.asarray(read_image(content))[0]
    assert first.tolist() == pytest.approx([s / 257 for s in samples[:3]], abs=1)
    assert second.tolist() == [255, 255, 255]


TYPES = {
    "float32": (np.float32, 32, [0.0, 0.5, 0.25, 1.0], [0, 128, 64, 255]),
    "float32 of integers": (np.float32, 32, [0, 128, 64, 255], [0, 128, 64, 255]),
    "int32 of 8 bits": (np.int32, 32, [0, 128, 64, 255], [0, 128, 64, 255]),
    "int32 of 16 bits": (np.int32, 32, [0, 32896, 257, 65535], [0, 128, 1, 255]),
    "uint32": (np.uint32, 32, [0, 32896, 257, 65535], [0, 128, 1, 255]),
    "uint16": (np.uint16, 16, [0, 32896, 257, 65535], [0, 128, 1, 255]),
    "int16": (np.int16, 16, [0, 32767, 257, 255], [0, 127, 1, 1]),
    "12 bits": (np.uint16, 12, [0, 2056, 16, 4095], [0, 128, 1, 255]),
    "uint8": (np.uint8, 8, [0, 128, 64, 255], [0, 128, 64, 255]),
}


@pytest.mark.parametrize("case", TYPES)
def test_tiff_of_every_type_is_scaled(case):
    dtype, bits, values, expected = TYPES[case]
    assert grey(tiff(np.array([values], dtype), bits)) == expected


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_tiff_whose_zero_is_white_is_not_read_as_a_negative(dtype):
    values = np.array([[0, 1]], dtype) * (65535 if dtype is np.uint16 else 1)
    assert grey(tiff(values, values.itemsize * 8, photometric=0)) == [255, 0]


@given(
    st.one_of(
        st.tuples(st.just(np.int32), st.one_of(st.integers(-(2**31), -1), st.integers(65536, 2**31 - 1))),
        st.tuples(st.just(np.int16), st.integers(-(2**15), -1)),
        st.tuples(st.just(np.uint32), st.integers(65536, 2**32 - 1)),
        st.tuples(
            st.just(np.float32),
            st.one_of(
                st.floats(max_value=-(2.0**-100), width=32),
                st.floats(min_value=65536, width=32),
                st.just(1.5),
                st.just(float("nan")),
            ),
        ),
    )
)
def test_values_that_cannot_be_scaled_are_named(case):
    dtype, value = case
    content = tiff(np.array([[0, 0], [0, value]], dtype), np.dtype(dtype).itemsize * 8)
    for read in (read_image, check_image):
        with pytest.raises(BadImage, match="image with values beyond 0 to 1"):
            read(content)


MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"]


@pytest.mark.parametrize("mode", [*MODES, "I", "F", "I;16", "I;16L", "I;16B", "I;16N"])
def test_every_mode_of_pillow_becomes_rgb(mode):
    """White, or what is transparent, is white."""
    image = Image.new("RGB", (4, 4), "white")
    if mode in ("La", "RGBa"):
        image = image.convert("LA" if mode == "La" else "RGBA").convert(mode)
    elif mode == "PA":
        image = image.quantize(2).convert("PA")
    elif mode.startswith("I;16"):
        image = Image.fromarray(np.full((4, 4), 65535, np.uint16)).convert("I;16")
        image = Image.frombytes(mode, (4, 4), b"\xff\xff" * 16)
    elif mode == "LAB":
        image = Image.new("LAB", (4, 4), (255, 128, 128))
    else:
        image = image.convert(mode)
    assert image.mode == mode
    found = np.asarray(convert_to_rgb(image))
    assert found.shape == (4, 4, 3)
    assert found.min() >= 254
    assert not convert_to_rgb(image).info


def rubbish(draw_from: st.DataObject) -> bytes:
    """EXIF that is random, or valid up to some bytes; never with a rotation."""
    if draw_from.draw(st.booleans()):
        return draw_from.draw(st.binary(max_size=40))
    exif = Image.Exif()
    exif[0x010E], exif[0x011A] = "a name", 2.5
    exif[0x8825], exif[0x8769] = {1: "N", 2: (1.0, 2.0, 3.0)}, {0xA005: {1: "R98"}}
    content = bytearray(exif.tobytes())
    for place in draw_from.draw(st.lists(st.integers(0, len(content) - 1), max_size=6)):
        content[place] = draw_from.draw(st.integers(0, 255))
    return bytes(content[: draw_from.draw(st.integers(1, len(content)))])


def png_with_metadata(data: st.DataObject) -> bytes:
    plain = encoded(Image.new("RGB", (8, 8), COLOR))
    names = [
        "tEXt",
        "zTXt",
        "iTXt",
        "iCCP",
        "eXIf",
        "gAMA",
        "cHRM",
        "sRGB",
        "pHYs",
        "tIME",
        "acTL",
        "fcTL",
        "prVt",
    ]
    name = data.draw(st.sampled_from(names)).encode()
    bodies = [data.draw(st.binary(max_size=30)), b"k\0\0" + TEXT, b"k\0\1\0\0\0" + TEXT]
    body = rubbish(data) if name == b"eXIf" else data.draw(st.sampled_from(bodies))
    place = data.draw(st.sampled_from([33, len(plain) - 12]))  # behind the header, or before the end
    return plain[:place] + chunk(name, body) + plain[place:]


def jpeg_with_metadata(data: st.DataObject) -> bytes:
    plain = encoded(Image.new("RGB", (8, 8), COLOR), "JPEG", quality=95)
    starts = [
        b"",
        b"Exif\0\0",
        b"JFIF",
        b"ICC_PROFILE\0",
        b"MPF\0II*\0\x08\0\0\0",
        b"Photoshop 3.0\x008BIM\x03\xed",
    ]
    starts += [b"Adobe", b"http://ns.adobe.com/xap/1.0/\0", b"FPXR\0"]
    body = data.draw(st.sampled_from(starts)) + rubbish(data)[: data.draw(st.integers(0, 60))]
    assume(not (body.startswith(b"Adobe") and len(body) == 12))  # it says which color space the pixels have
    marker = data.draw(st.sampled_from([0xE0, 0xE1, 0xE2, 0xEB, 0xED, 0xEE, 0xFE]))
    return plain[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body + plain[2:]


def webp_with_metadata(data: st.DataObject) -> bytes:
    options = {name: data.draw(st.binary(max_size=30)) for name in ("xmp", "icc_profile")}
    return encoded(Image.new("RGB", (8, 8), COLOR), "WEBP", lossless=True, exif=rubbish(data), **options)


def tiff_with_metadata(data: st.DataObject) -> bytes:
    tag = data.draw(st.sampled_from([34665, 34853, 40965, 700, 34675, 33723, 34377, 330]))
    kind, count = (
        data.draw(st.sampled_from([1, 2, 3, 4, 5, 7, 13, 99])),
        data.draw(st.sampled_from([1, 2, 1 << 20])),
    )
    place = data.draw(st.one_of(st.integers(0, 300), st.just(1 << 30)))
    content = bytearray(encoded(Image.new("RGB", (8, 8), COLOR), "TIFF"))
    (start,) = struct.unpack_from("<I", content, 4)
    (number,) = struct.unpack_from("<H", content, start)
    entries = [bytes(content[start + 2 + 12 * i : start + 14 + 12 * i]) for i in range(number)]
    entries.append(struct.pack("<HHII", tag, kind, count, place))
    entries.sort(key=lambda entry: entry[1] << 8 | entry[0])
    content += b"\0" * (len(content) % 2)
    struct.pack_into("<I", content, 4, len(content))
    return bytes(content) + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


TEXT = zlib.compress(b"x" * 3_000_000)
WRITERS = [png_with_metadata, jpeg_with_metadata, webp_with_metadata, tiff_with_metadata]


@pytest.mark.parametrize("write", WRITERS)
@settings(max_examples=60)
@given(data=st.data())
def test_no_metadata_make_an_image_unreadable(write, data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = write(data)
        image = read_image(content)
        assert check_image(content) == image.size == (8, 8)
        assert image.getpixel((4, 4)) == pytest.approx(COLOR, abs=6)
        assert convert_to_rgb(image) == image


def test_a_rotation_is_read_beside_text_that_pillow_refuses():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.new("RGB", (8, 4)), exif=exif)
    content = content[:33] + chunk(b"zTXt", b"k\0\0" + TEXT) + content[33:]
    assert check_image(content) == read_image(content).size == (4, 8)
    assert convert_to_rgb(read_image(content)).size == (4, 8)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@given(st.data())
def test_an_image_that_is_cut_stays_bad_beside_text_that_pillow_refuses(form, data):
    content = encoded(drawing(0, (16, 16)), form)
    content = content[: data.draw(st.integers(40, len(content) - 40))]
    if form == "PNG":
        content = content[:33] + chunk(b"zTXt", b"k\0\0" + TEXT) + content[33:]
    with pytest.raises(BadImage, match="does not decode"):
        read_image(content)


def test_formats_that_run_programs_are_not_opened():
    with pytest.raises(BadImage, match="does not decode"):
        read_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PPM")
    with pytest.raises(BadImage, match="does not decode"):
        read_image(buffer.getvalue())
