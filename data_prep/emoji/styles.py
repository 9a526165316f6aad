"""Four styles of the same concepts, and folds that hold combinations of concept and style out of training.

`build` makes the tars of two styles more than the emoji pack has; `split` makes a fold of the four. README.md
beside this file gives provenance and licenses.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from data_prep.emoji.build import (
    EMOJIBASE,
    IMAGE_SIZE,
    STARTER_CONCEPTS,
    join_pairs,
    pack,
    read_labels,
    render,
)
from data_prep.images import decode_caption
from data_prep.npm import NpmPackage, read_package
from data_prep.readers.records import RawPair
from data_prep.readers.webdataset import tar_pairs
from megafusion.errors import UserError, exit_on_user_error
from megafusion.storage import new_folder, read_lines, write_file

TWEMOJI = NpmPackage(
    "emoji-datasource-twitter", "16.0.0", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"
)
OPENMOJI = NpmPackage(
    "openmoji", "17.0.0", "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68"
)

STARTER = [
    concept.strip()
    for concept in f"""{STARTER_CONCEPTS},
pear, peach, cherries, pineapple, tomato, ear of corn, broccoli, croissant, pretzel, popcorn, ice cream,
lollipop, tiger face, rabbit face, koala, elephant, whale, snail, honeybee, owl, bus, bicycle, tractor,
helicopter, camera, television, wrench, hammer, bomb, teddy bear, drum, violin, bread, cheese wedge,
french fries, hot dog, taco, sushi, cookie, candy, hot beverage, beer mug, egg, garlic, chicken, duck, eagle,
crab, spider, scorpion, dolphin, snake, dragon face, unicorn, cow face, hamster, maple leaf, four leaf clover,
rose, cloud, anchor, magnet""".split(",")
]
"""Labels of the 128 concepts whose images in all four styles are committed."""

PACK = Path("data_prep/emoji/emoji-000000.tar")
COMMITTED = Path("data_prep/emoji/starter_styles")
GLOSSES = Path("data_prep/text/glosses.txt")
NUM_FOLDS = 5
NUM_HELD_OUT_TEXTS = 500
MARKER = "captions.json"


def concept_of(key: str) -> str:
    """The concept of a key: `1F34E` of `1F34E-3d`."""
    return key.rpartition("-")[0]


def style_of(key: str) -> str:
    """The style of a key: `3d` of `1F34E-3d`."""
    return key.rpartition("-")[2]


def common_keys(keys: Iterable[str], styles: Sequence[str]) -> list[str]:
    """Sorted keys of the concepts that exist in every one of the styles."""
    found = set(keys)
    concepts = sorted({concept_of(key) for key in found})
    rows = ([f"{concept}-{style}" for style in styles] for concept in concepts)
    return [key for row in rows if found.issuperset(row) for key in row]


def ranked_concepts(concepts: Iterable[str]) -> list[str]:
    """Concepts in the order of their hashes, in which neighbours in the alphabet (the hearts) are apart."""
    return sorted(set(concepts), key=lambda concept: hashlib.sha256(concept.encode()).digest())


def keys_of_concepts(keys: Sequence[str], num_concepts: int) -> list[str]:
    """Keys of the first concepts in the order of hashes. A fold of fewer concepts is a part of that of more.

    Raises UserError if there are fewer.
    """
    ranked = ranked_concepts(map(concept_of, keys))
    if num_concepts > len(ranked):
        raise UserError(f"--num-concepts {num_concepts}: there are {len(ranked)}; give at most as many")
    chosen = set(ranked[:num_concepts])
    return [key for key in keys if concept_of(key) in chosen]


def held_out_keys(keys: Sequence[str], fold: int, num_folds: int = NUM_FOLDS) -> list[str]:
    """Keys that a fold holds out, in their order; over all folds, each key is held out exactly once.

    A fold takes at most one style of a concept, and, of concepts in all styles, about one `num_folds`-th of
    each style. So each concept and each style is in training. Which fold takes a key depends on the set of
    keys, not on their order. Raises UserError for a fold that there is not, and for a concept of one style.
    """
    styles = sorted({style_of(key) for key in keys})
    if not 0 <= fold < num_folds:
        raise UserError(f"fold {fold}: there are {num_folds}; give one from 0 to {num_folds - 1}")
    if not 2 <= len(styles) <= num_folds:
        raise UserError(f"{len(styles)} styles in {num_folds} folds; give 2 styles or more, as many folds")
    if len(set(keys)) < len(keys):
        raise UserError("the keys are not unique; give each once")
    by_concept: dict[str, set[str]] = defaultdict(set)
    for key in keys:
        by_concept[concept_of(key)].add(style_of(key))
    if alone := sorted(concept for concept, own in by_concept.items() if len(own) == 1):
        raise UserError(f"concept {alone[0]} has one style, so its image cannot be held out; remove it")
    rank = {concept: place for place, concept in enumerate(ranked_concepts(by_concept))}
    return [k for k in keys if (rank[concept_of(k)] + styles.index(style_of(k))) % num_folds == fold]


def build(
    packages: Annotated[Path, typer.Option(help="Folder with the three npm tarballs (see README.md).")],
    out: Annotated[Path, typer.Option(help="Folder to write twemoji.tar, openmoji.tar and keys.txt to.")],
    pack_tar: Annotated[Path, typer.Option("--pack", help="The emoji pack: the other two styles.")] = PACK,
    starter: Annotated[bool, typer.Option("--starter", help="The 128 committed concepts alone.")] = False,
) -> None:
    """Build two more styles of the emoji pack's concepts from pinned npm tarballs."""
    from resvg_py import svg_to_bytes

    labels = read_labels(json.loads(read_package(EMOJIBASE, packages, "en/data.json")[""]))
    twemoji = read_package(TWEMOJI, packages, "img/twitter/64/")
    openmoji = read_package(OPENMOJI, packages, "color/svg/")
    joined = join_pairs(labels, {"twemoji": twemoji, "openmoji": openmoji})
    captions = {key: text for key, (_, text) in joined.items()}
    captions |= {pair.key: decode_caption(pair.caption) for pair in tar_pairs(pack_tar)}
    keys = common_keys(captions, styles := sorted({style_of(key) for key in captions}))
    if starter:
        label_of = {key: captions[key].rpartition(", ")[0] for key in keys}
        if missing := sorted(set(STARTER) - set(label_of.values())):
            raise UserError(f"concepts not in every style: {missing}; correct STARTER in {__file__}")
        keys = [key for key in keys if label_of[key] in STARTER]
    tars = {}
    for style in ("twemoji", "openmoji"):
        images = {key: joined[key] for key in keys if style_of(key) == style}
        drawn = {
            key: (render(svg_to_bytes(svg_string=image.decode(), width=4 * IMAGE_SIZE)), text)
            if style == "openmoji"
            else (render(image), text)
            for key, (image, text) in images.items()
        }
        tars[style] = pack(drawn)
        write_file(out / f"{style}.tar", tars[style])
    write_file(out / "keys.txt", "".join(f"{key}\n" for key in keys))
    num_bytes = sum(map(len, tars.values()))
    typer.echo(f"{len(keys)} pairs of {len(keys) // len(styles)} concepts; {num_bytes} bytes of new images")


def split(
    out: Annotated[Path, typer.Option(help="Folder to write the fold to.")],
    fold: Annotated[int, typer.Option(min=0, help="Fold, such as the run's seed modulo the folds.")] = 0,
    num_folds: Annotated[int, typer.Option(min=2, help="Folds; 1 of so many combinations is held out.")] = 5,
    num_concepts: Annotated[int | None, typer.Option(min=1, help="Concepts to keep; all by default.")] = None,
    styles: Annotated[Path, typer.Option(help="Folder that `build` wrote.")] = COMMITTED,
    pack_tar: Annotated[Path, typer.Option("--pack", help="The emoji pack: the other two styles.")] = PACK,
    texts: Annotated[Path, typer.Option(help="Texts, one a line; the last 500 are held out.")] = GLOSSES,
) -> None:
    """Write a fold: train.txt, held-out.txt, text.txt, held-out-text.txt, captions.json and images/.

    captions.json is in COCO's format for captions; `group` is seen or held-out, `key` names each image.
    """
    keys = read_lines(styles / "keys.txt")
    keys = keys_of_concepts(keys, num_concepts) if num_concepts else keys
    tars = (pack_tar, styles / "twemoji.tar", styles / "openmoji.tar")
    pairs = {pair.key: pair for tar in tars for pair in tar_pairs(tar)}
    if missing := [key for key in keys if key not in pairs]:
        raise UserError(f"{styles}: {missing[0]} of keys.txt is in none of {', '.join(map(str, tars))}")
    held_out = set(held_out_keys(keys, fold, num_folds))
    lines = read_lines(texts)
    if len(lines) <= NUM_HELD_OUT_TEXTS:
        raise UserError(f"{texts}: has {len(lines)} lines, and {NUM_HELD_OUT_TEXTS} are held out; add more")
    files = {
        "train.txt": [key for key in keys if key not in held_out],
        "held-out.txt": [key for key in keys if key in held_out],
        "text.txt": lines[:-NUM_HELD_OUT_TEXTS],
        "held-out-text.txt": lines[-NUM_HELD_OUT_TEXTS:],
    }
    with new_folder(out, MARKER) as partial:
        (partial / "images").mkdir()
        for key in keys:
            (partial / "images" / f"{key}.webp").write_bytes(pairs[key].image)
        for name, content in files.items():
            (partial / name).write_text("".join(f"{line}\n" for line in content))
        coco = coco_captions([pairs[key] for key in keys], held_out)
        (partial / MARKER).write_text(json.dumps(coco, indent=1) + "\n")
    counts = ", ".join(f"{len(content)} {name}" for name, content in files.items())
    typer.echo(f"fold {fold} of {num_folds}: {counts}")


def coco_captions(pairs: Sequence[RawPair], held_out: set[str]) -> dict[str, list[dict]]:
    """COCO's annotation file for captions, with `key` and `group` beside each image."""
    images: list[dict] = []
    annotations: list[dict] = []
    for number, pair in enumerate(pairs, 1):
        group = "held-out" if pair.key in held_out else "seen"
        file_name = f"images/{pair.key}.webp"
        images.append({"id": number, "file_name": file_name, "key": pair.key, "group": group})
        annotations.append({"id": number, "image_id": number, "caption": decode_caption(pair.caption)})
    return {"images": images, "annotations": annotations}


app = typer.Typer(add_completion=False, help="Four styles of the same concepts, and folds of them.")
app.command()(build)
app.command()(split)

if __name__ == "__main__":
    with exit_on_user_error():
        app()
