"""Builder of the emoji pack: 64 x 64 images in two styles with captions, as one webdataset tar.

Images come from Fluent Emoji ("3d") and Noto Emoji ("flat"), captions from emojibase; README.md beside
this file gives provenance and licenses.
"""

import io
import json
import tarfile
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from data_prep.npm import NpmPackage, read_package
from megafusion.errors import UserError, exit_on_user_error
from megafusion.storage import write_file

FLUENT = NpmPackage(
    "@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
)
NOTO = NpmPackage(
    "emoji-datasource-google", "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
)
EMOJIBASE = NpmPackage(
    "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"
)

IMAGE_SIZE = 64
WEBP_QUALITY = 90
SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
FLAG_GROUP = 9

FLUENT_DUPLICATE = "1F63A"
"""Fluent ships one image for both `cat face` (1F431) and `grinning cat` (1F63A)."""

STARTER_CONCEPTS = """
red apple, banana, strawberry, watermelon, lemon, grapes, carrot, avocado, mushroom, pizza, hamburger,
doughnut, birthday cake, red heart, yellow heart, green heart, blue heart, purple heart, black heart,
cat face, dog face, frog, panda, fox, lion, pig face, monkey face, penguin, octopus, turtle, butterfly,
lady beetle, tropical fish, ghost, skull, robot, alien, snowman, jack-o-lantern, sun, star, crescent moon,
rainbow, snowflake, fire, evergreen tree, palm tree, cactus, sunflower, tulip, automobile, airplane, rocket,
sailboat, house, umbrella, balloon, wrapped gift, soccer ball, basketball, guitar, key, bell,
crown, trophy, light bulb
"""
"""Labels of the starter split: everyday, short, and visually distinct in both styles."""


def code_points(name: str) -> str:
    """`1f3f4-fe0f-200d` as `1F3F4-200D`: upper case, padded to four digits, no variation selector."""
    points = (point.upper().zfill(4) for point in name.split("-"))
    return "-".join(point for point in points if point != "FE0F")


def read_labels(emojis: list[dict]) -> dict[str, str]:
    """English label by code points, from emojibase's list, without flags, skin tones and components.

    Flags are hundreds of near-identical rectangles; components have no group.
    """
    labels = {}
    for emoji in emojis:
        key = code_points(emoji["hexcode"])
        if emoji.get("group", FLAG_GROUP) != FLAG_GROUP and not SKIN_TONES & set(key.split("-")):
            labels[key] = emoji["label"]
    return labels


def render(encoded: bytes) -> bytes:
    """An encoded image as WebP: composited on white, padded to a square, 64 x 64, RGB."""
    image = Image.open(io.BytesIO(encoded)).convert("RGBA")
    side = max(image.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    image = canvas.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=WEBP_QUALITY, method=6)
    return buffer.getvalue()


def join_pairs(labels: dict[str, str], styles: dict[str, dict[str, bytes]]) -> dict[str, tuple[bytes, str]]:
    """(encoded image, caption) by key, sorted; `styles` maps a style to encoded images by file name.

    A key is code points and style, such as `1F34E-3d`, without the dot that would end it in webdataset.
    """
    pairs = {}
    for style, files in styles.items():
        # Reversed, so that of two files for the same code points the first by name is kept.
        images = {code_points(Path(name).stem): files[name] for name in reversed(list(files))}
        if style == "3d":
            images.pop(FLUENT_DUPLICATE, None)
        for key in labels.keys() & images.keys():
            pairs[f"{key}-{style}"] = (images[key], f"{labels[key]}, {style} style")
    return dict(sorted(pairs.items()))


def pack(pairs: dict[str, tuple[bytes, str]]) -> bytes:
    """A webdataset tar of KEY.webp and KEY.txt; the same pairs give the same bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for key, (image, caption) in pairs.items():
            for extension, content in (("webp", image), ("txt", caption.encode())):
                # A fresh TarInfo has mtime 0, owner 0 and mode 644, whatever the machine.
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def starter_keys(captions: dict[str, str], concepts: list[str]) -> list[str]:
    """Keys of the concepts in both styles, in their order. UserError for one that the pack lacks."""
    by_caption = {caption: key for key, caption in captions.items()}
    selected = [f"{concept}, {style} style" for concept in concepts for style in ("3d", "flat")]
    missing = [caption for caption in selected if caption not in by_caption]
    if missing:
        raise UserError(
            f"starter concepts not in the pack: {missing}; correct STARTER_CONCEPTS in {__file__}"
        )
    return [by_caption[caption] for caption in selected]


def build(
    packages: Annotated[Path, typer.Option(help="Folder with the three npm tarballs (see README.md).")],
    out: Annotated[Path, typer.Option(help="Folder to write emoji-000000.tar and starter.txt to.")],
) -> None:
    """Build the emoji pack and its starter split from pinned npm tarballs."""
    labels = read_labels(json.loads(read_package(EMOJIBASE, packages, "en/data.json")[""]))
    fluent = read_package(FLUENT, packages, "assets/")
    noto = read_package(NOTO, packages, "img/google/64/")
    joined = join_pairs(labels, {"3d": fluent, "flat": noto})
    pairs = {key: (render(image), text) for key, (image, text) in joined.items()}
    concepts = [concept.strip() for concept in STARTER_CONCEPTS.split(",")]
    starter = starter_keys({key: caption for key, (_, caption) in pairs.items()}, concepts)
    content = pack(pairs)
    write_file(out / "emoji-000000.tar", content)
    write_file(out / "starter.txt", "".join(f"{key}\n" for key in starter).encode())
    typer.echo(f"{len(pairs)} pairs, {len(content)} bytes; {len(starter)} starter keys")


if __name__ == "__main__":
    with exit_on_user_error():
        typer.run(build)
