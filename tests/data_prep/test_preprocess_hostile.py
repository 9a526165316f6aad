"""Bad inputs: each fails by name, or is skipped and counted; no name or link leads out of the inputs."""

import gzip
import json
import random
import resource
import struct
import tarfile
import zlib

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from data_prep.config import PreprocessConfig
from data_prep.images import check_image, open_rgb
from data_prep.readers.records import BadRecord
from megafusion.config import parse_config
from megafusion.data.reader import ShardFolder
from megafusion.errors import UserError
from tests.support.raw import drawing, encoded, png, strange_images, write_members, write_tar
from tests.support.tars import link


def bomb() -> bytes:
    """A PNG whose header says 100,000 x 100,000 pixels, with hardly any data."""

    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


FINE = [("a.png", png()), ("a.txt", b"red"), ("b.png", png("blue")), ("b.txt", b"blue")]
BAD_MEMBERS = {
    "corrupt image": ([("x.png", png()[:70]), ("x.txt", b"x")], "x", "image does not decode"),
    "decompression bomb": ([("x.png", bomb()), ("x.txt", b"x")], "x", "image has too many pixels"),
    "program": ([("x.png", b"%!PS-Adobe-3.0 EPSF-3.0\n"), ("x.txt", b"x")], "x", "does not decode"),
    "empty caption": ([("x.png", png()), ("x.txt", b" \n")], "x", "empty caption"),
    "100 kB caption": ([("x.png", png()), ("x.txt", b"x" * 100_000)], "x", "more than 65536 bytes"),
    "invalid UTF-8": ([("x.png", png()), ("x.txt", b"caf\xe9")], "x", "caption is not UTF-8"),
    "no caption": ([("x.png", png())], "x", "no caption"),
    "path traversal": (
        [("../../x.png", png()), ("../../x.txt", b"x")],
        "../../x.png",
        "leads out of the tar",
    ),
    "absolute path": ([("/etc/x.png", png())], "/etc/x.png", "leads out of the tar"),
    "symlink": ([link("x.png", "/etc/passwd"), ("x.txt", b"x")], "x.png", "a link or another member"),
    "doubled member": ([("x.png", png()), ("x.png", png()), ("x.txt", b"x")], "x", "has this key twice"),
    "key again": ([("a.png", png()), ("a.txt", b"red")], "a", "has this key twice"),
    "dots in its key": ([("x.y.png", png()), ("x.y.txt", b"x")], "x", "ends at a name's first dot"),
    "bad scores": ([("x.png", png()), ("x.txt", b"x"), ("x.json", b"{")], "x", "not valid JSON"),
}


@pytest.mark.parametrize("case", BAD_MEMBERS)
def test_bad_members_fail_by_name_or_are_counted(make, tmp_path, case):
    members, where, reason = BAD_MEMBERS[case]
    tar = write_members(tmp_path / "in.tar", [*FINE, *members])
    with pytest.raises(UserError, match=rf"in\.tar, key '{where}': .*{reason}.*set on_error=skip"):
        make(images=(tar,))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["in.tar"]
    (made,) = make(images=(tar,), on_error="skip")
    assert made.num_documents == 2
    report = json.loads((tmp_path / "out/pairs/report.json").read_text())
    assert any(reason in name for name in report["bad"])
    assert sum(report["bad"].values()) <= 2
    names = {"out", "in.tar", "pairs", "shard-000000.tar", "shard-000000.index.npy"}
    names |= {"manifest.json", "report.json", "inputs.json", "sheet.png"}
    assert {path.name for path in tmp_path.rglob("*")} == names


def cut(content: bytes) -> bytes:
    return content[: content.index(b"b.png") + 600]


def without_end(content: bytes) -> bytes:
    return content.rstrip(b"\0") + b"\0" * (-len(content.rstrip(b"\0")) % 512)


def with_wrong_size(content: bytes) -> bytes:
    """The first member's size is 600 bytes too large, with a valid checksum."""
    info = tarfile.TarInfo.frombuf(content[:512], "utf-8", "strict")
    info.size += 600
    return info.tobuf(tarfile.USTAR_FORMAT)[:512] + content[512:]


def with_bad_header(content: bytes) -> bytes:
    middle = content.index(b"b.png")
    return content[: middle + 148] + b"garbage!" + content[middle + 156 :]


@pytest.mark.parametrize("damage", [cut, without_end, with_wrong_size, with_bad_header])
def test_corrupt_tars_fail_by_name_or_are_skipped_from_the_corruption_on(make, tmp_path, damage):
    good = {f"k{i}": {"png": encoded(drawing(i)), "txt": b"x"} for i in range(4)}
    intact = write_tar(tmp_path / "good.tar", good)
    broken = write_members(tmp_path / "broken.tar", FINE)
    broken.write_bytes(damage(broken.read_bytes()))
    with pytest.raises(UserError, match=r"broken\.tar.*on_error=skip"):
        make(images=(broken, intact))
    (made,) = make(images=(broken, intact), on_error="skip", max_skip_rate=1.0)
    report = json.loads((tmp_path / "out/pairs/report.json").read_text())
    assert any("not readable as a tar to its end" in reason for reason in report["bad"])
    assert 4 <= made.num_documents < 6


def bad_parquet(path):
    parquet.write_table(pyarrow.table({"text": ["one", "two"]}), path)
    path.write_bytes(path.read_bytes()[:-20])


def bad_texts(path):
    column = pyarrow.array([b"fine", b"caf\xe9"]).cast(pyarrow.string(), safe=False)
    parquet.write_table(pyarrow.table({"text": column}), path)


BAD_FILES = {
    "a.txt": (lambda p: p.write_bytes(b"fine\n\xff\xfe\n"), r"a\.txt, line 2: not UTF-8"),
    "b.jsonl": (lambda p: p.write_text('{"text": "x"}\n{"text": 1}\n'), r"b\.jsonl, line 2: no string"),
    "c.jsonl": (lambda p: p.write_text('{"text": "x"}\n{"te'), r"c\.jsonl, line 2: not valid JSON"),
    "f.jsonl": (lambda p: p.write_text('{"text": "x"}\n{"text": "\\ud800"}\n'), r"f\.jsonl, line 2: not"),
    "d.jsonl": (
        lambda p: p.write_text('{"text": "x"}\n' + "[" * 100_000),
        r"d\.jsonl, line 2: JSON nested too deeply",
    ),
    "e.parquet": (bad_parquet, r"e\.parquet: not readable as parquet"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_lines_and_tables(make, tmp_path, name):
    write, message = BAD_FILES[name]
    (tmp_path / "z.txt").write_text("one\n")
    write(tmp_path / name)
    with pytest.raises(UserError, match=message):
        make(texts=(tmp_path / name, tmp_path / "z.txt"))
    (made,) = make(texts=(tmp_path / name, tmp_path / "z.txt"), on_error="skip")
    assert made.num_documents == (1 if name == "e.parquet" else 2)


def mmc4(**changes) -> dict:
    """A document of MMC4 with one image, some of whose values are changed."""
    return {
        "text_list": ["a", "b"],
        "image_info": [{"image_name": "fine.png", "matched_text_index": 0} | changes],
    }


BAD_DOCUMENTS = {
    "of unequal lengths": ({"texts": ["a", "b"], "images": [None]}, "not two lists of equal length"),
    "with a parent path": ({"texts": [None], "images": ["../secret.png"]}, "leads out of document_images"),
    "with an absolute path": ({"texts": [None], "images": ["/etc/passwd"]}, "leads out of document_images"),
    "with a missing image": ({"texts": [None], "images": ["no.png"]}, "not in document_images"),
    "with a corrupt image": ({"texts": ["x", None], "images": [None, "bad.png"]}, "does not decode"),
    "without segments": ({"texts": [None], "images": [None]}, "empty document"),
    "of numbers": ({"texts": [1], "images": [None]}, "a text is not a string"),
    "of half a layout": ({"texts": ["a"]}, "not two lists of equal length"),
    "of no layout": (
        {"text": "a", "image_list": []},
        r"has neither `texts` and `images` \(OBELICS\), `text_list` and `image_info` \(MMC4\), nor `source`, "
        r"`instruction` and `target` \(edits\); its keys are \['image_list', 'text'\]",
    ),
    "of half of MMC4's": ({"text_list": ["a"]}, r"its keys are \['text_list'\]"),
    "with keys that are markup": ({"[/x]": 1, "\x1b[31m": 2}, r"its keys are \['\\x1b\[31m', '\[/x\]'\]"),
    "of half a character": ({"texts": ["\ud800"], "images": [None]}, "not UTF-8"),
    "of half a character in MMC4": ({"text_list": ["\ud800"], "image_info": []}, "not UTF-8"),
    "with half a character in a key": ({"\ud800": 1}, "not UTF-8"),
    "with a URL": ({"texts": [None], "images": ["http://x.org/a.png"]}, "an image is a URL: fetch"),
    "whose image is missing": (mmc4(image_name="no.png"), "not in document_images"),
    "whose image is a parent path": (mmc4(image_name="../secret.png"), "leads out of document_images"),
    "whose image is corrupt": (mmc4(image_name="bad.png"), "does not decode"),
    "matched beyond the end": (mmc4(matched_text_index=2), "`matched_text_index` that is in `text_list`"),
    "matched before the start": (mmc4(matched_text_index=-1), "`matched_text_index` that is in"),
    "matched to null": (mmc4(matched_text_index=None), "`matched_text_index` that is in"),
    "matched to true": (mmc4(matched_text_index=True), "`matched_text_index` that is in"),
    "matched to 0.5": (mmc4(matched_text_index=0.5), "`matched_text_index` that is in"),
    "with a null name": (mmc4(image_name=None), "an image without `image_name`"),
    "with a null image": ({"text_list": ["a"], "image_info": [None]}, "an image without `image_name`"),
    "with null for images": ({"text_list": ["a"], "image_info": None}, "are not two lists"),
    "with null for sentences": ({"text_list": None, "image_info": []}, "are not two lists"),
    "with a null sentence": ({"text_list": ["a", None], "image_info": []}, "a sentence is not a string"),
    "of empty sentences": ({"text_list": [" "], "image_info": []}, "empty document"),
}


@pytest.mark.parametrize("case", BAD_DOCUMENTS)
def test_bad_documents(make, tmp_path, case):
    document, reason = BAD_DOCUMENTS[case]
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "images").mkdir()
    (tmp_path / "images/bad.png").write_bytes(png()[:70])
    (tmp_path / "images/fine.png").write_bytes(png())
    good = {"texts": ["fine"], "images": [None]}
    (tmp_path / "d.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(document)}\n")
    values = {"documents": (tmp_path / "d.jsonl",), "document_images": tmp_path / "images"}
    with pytest.raises(UserError, match=rf"d\.jsonl, line 2: .*{reason}"):
        make(**values)
    (made,) = make(**values, on_error="skip")
    assert made.num_documents == 1
    reasons = json.loads((tmp_path / "out/interleaved/report.json").read_text())["bad"]
    assert "its keys" not in str(reasons)  # reasons are few, however many documents are bad


@pytest.mark.parametrize("damage", ["cut", "packed", "doubled"])
def test_a_bad_tar_of_document_images_is_named(make, tmp_path, damage):
    members = [("a.png", png()), ("a.png" if damage == "doubled" else "b.png", png())]
    write_members(tmp_path / "p.tar", members)
    content = (tmp_path / "p.tar").read_bytes()
    if damage != "doubled":
        (tmp_path / "p.tar").write_bytes(gzip.compress(content) if damage == "packed" else content[:1100])
    (tmp_path / "d.jsonl").write_text(json.dumps({"texts": [None], "images": ["a.png"]}) + "\n")
    values = {"documents": (tmp_path / "d.jsonl",), "document_images": tmp_path / "p.tar"}
    with pytest.raises(
        UserError, match=r"p\.tar: (is corrupt, or not an uncompressed tar|has 'a.png' twice)"
    ):
        make(**values, on_error="skip")


def test_a_compressed_tar_in_a_folder_of_images_is_named(make, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/b.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"b\.tar\.gz: is compressed"):
        make(images=(tmp_path / "raw",))


@pytest.mark.parametrize("name", ["docs_no_face_shard_0_v3.jsonl.zip", "d.jsonl.gz"])
def test_compressed_files_are_refused(make, tmp_path, name):
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(UserError, match=rf"{name}: is compressed.*unpack it first"):
        make(documents=(tmp_path / name,))


def test_a_link_out_of_document_images_is_refused(make, tmp_path):
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "images").mkdir()
    (tmp_path / "images/x.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "d.jsonl").write_text('{"texts": ["a"], "images": ["x.png"]}\n')
    with pytest.raises(UserError, match="leads out of document_images"):
        make(documents=(tmp_path / "d.jsonl",), document_images=tmp_path / "images")


@pytest.mark.parametrize("num_bad", [3, 40])
def test_a_rate_of_bad_inputs_above_the_limit_stops_the_command(make, tmp_path, num_bad):
    images = {f"k{i:03d}": {"png": png() if i >= num_bad else b"x", "txt": b"x"} for i in range(80)}
    tar = write_tar(tmp_path / "in.tar", images)
    if num_bad == 3:  # within what chance explains
        assert make(images=(tar,), on_error="skip")[0].num_documents == 77
        return
    message = r"40 of 80 inputs are bad \(40 x image does not decode as [A-Z, ]+\), more than max_skip_rate"
    with pytest.raises(UserError, match=message):
        make(images=(tar,), on_error="skip")
    assert not (tmp_path / "out/pairs").exists()
    assert make(images=(tar,), on_error="skip", max_skip_rate=0.6)[0].num_documents == 40


def rotated() -> bytes:
    """Green above blue, stored rotated, with the EXIF tag for it."""
    upright = Image.new("RGB", (40, 40), "blue")
    upright.paste("lime", (0, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(upright.rotate(90), "JPEG", exif=exif, quality=95)


def animated(form: str) -> bytes:
    frames = [Image.new("RGB", (40, 40), color) for color in ("lime", "red", "red")]
    return encoded(frames[0], form, save_all=True, append_images=frames[1:])


UNUSUAL_IMAGES = {
    "cmyk": (lambda: encoded(Image.new("CMYK", (40, 40), (255, 0, 255, 0)), "JPEG"), (0, 255, 0)),
    "16-bit": (lambda: encoded(Image.fromarray(np.full((40, 40), 32768, np.uint16))), (128, 128, 128)),
    "animated gif": (lambda: animated("GIF"), (0, 255, 0)),
    "animated webp": (lambda: animated("WEBP"), (0, 255, 0)),
    "1 x 1": (lambda: png("lime", (1, 1)), (0, 255, 0)),
    "exif": (rotated, ((0, 255, 0), (0, 0, 255))),
    "transparent": (lambda: encoded(Image.new("RGBA", (40, 40), (0, 0, 0, 0))), (255, 255, 255)),
    "palette": (lambda: encoded(Image.new("RGB", (40, 40), "lime").quantize(4)), (0, 255, 0)),
    **{name: (lambda content=content: content, (0, 255, 0)) for name, content in strange_images().items()},
    "float TIFF": (lambda: strange_images()["float TIFF"], (128, 128, 128)),
    "transparent 16-bit grey": (lambda: strange_images()["transparent 16-bit grey"], (255, 255, 255)),
}


@pytest.mark.parametrize("case", UNUSUAL_IMAGES)
def test_unusual_images_become_upright_rgb(make, tmp_path, vae_folder, case):
    """Latents equal those of the expected image, up to JPEG compression."""
    write, colors = UNUSUAL_IMAGES[case]
    expected = Image.new("RGB", (32, 32), colors if isinstance(colors[0], int) else colors[1])
    if not isinstance(colors[0], int):
        expected.paste(colors[0], (0, 0, 32, 16))
    reference = write_tar(tmp_path / "reference.tar", {"a": {"png": encoded(expected), "txt": b"x"}})
    odd = write_tar(tmp_path / "odd.tar", {"a": {"png": write(), "txt": b"x"}})
    moments = []
    for number, tar in enumerate((odd, reference)):
        make(images=(tar,), out=tmp_path / str(number))
        moments.append(ShardFolder(tmp_path / f"{number}/pairs").read(0).segments[1].data.astype(np.float32))
    assert np.abs(moments[0] - moments[1]).max() < 0.2
    assert np.abs(moments[0]).max() > 0.2 or case in ("16-bit", "float TIFF")


def test_a_decompression_bomb_is_refused_before_it_takes_memory():
    """Decoded it would take 30 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadRecord, match="image has too many pixels"):
        open_rgb(bomb())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # in kB


def test_pillows_warning_is_an_error():
    """Between its limit and twice that, Pillow only warns."""
    with pytest.raises(BadRecord, match="image has too many pixels"):
        open_rgb(encoded(Image.new("1", (10_000, 9_000))))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [*range(1, 9), 99])
def test_checked_size_is_that_of_the_upright_image(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(drawing(0, (50, 30)), form, exif=exif)
    assert check_image(content) == open_rgb(content).size


def test_checking_refuses_the_corrupt_images_that_decoding_refuses():
    """JPEG is checked at an eighth of its size: 600 random corruptions of several encodings."""
    chance = random.Random(0)
    images = [drawing(0, (50, 30)), drawing(1, (64, 64)).convert("L"), drawing(2, (33, 57)).convert("CMYK")]
    encodings = [encoded(image, "JPEG", progressive=mode) for image in images for mode in (False, True)]
    num_refused = 0
    for _ in range(600):
        content = bytearray(chance.choice(encodings))
        if chance.random() < 0.3:
            del content[chance.randrange(1, len(content)) :]
        for _ in range(chance.randrange(6)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        sizes = []
        for check in (check_image, lambda content: open_rgb(content).size):
            try:
                sizes.append(check(bytes(content)))
            except BadRecord as error:
                sizes.append(error.reason)
        assert sizes[0] == sizes[1]
        num_refused += isinstance(sizes[0], str)
    assert 100 < num_refused < 500


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pictures": ["a.tar"]}, "key 'pictures' was renamed: it is 'images' now"),
        ({"images": "latents"}, r"images: latents has moved: write image_storage: latents \('images' names"),
        ({"images": "pictures"}, "images: pictures has moved: write image_storage: pixels"),
        ({"images": "a.tar"}, r"key 'images' is a list: write \[a.tar\]"),
        ({"document_pictures": "x"}, "key 'document_pictures' was renamed: it is 'document_images' now"),
        ({"picture_column": "x"}, "key 'picture_column' was renamed: it is 'image_column' now"),
        ({"filters": {"scores": {"a": {"least": 5.0}}}}, "was renamed: it is 'filters.scores.a.min' now"),
    ],
)
def test_configurations_of_the_version_before_are_refused_with_the_new_keys(values, message):
    with pytest.raises(UserError, match=message):
        parse_config(PreprocessConfig, {"out": "x", "tokenizer": "x", "vae": "x"} | values, "test.yaml")
