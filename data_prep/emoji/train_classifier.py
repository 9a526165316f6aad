"""Training and measuring of the classifier of generated images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from data_prep.images import open_rgb
from data_prep.readers.webdataset import tar_pairs
from megafusion.errors import UserError, exit_on_user_error
from megafusion.evaluate.classifier import IMAGE_SIZE, OTHER, REJECTION_COSINE, ImageClassifier
from megafusion.evaluate.distortions import CORRUPTIONS, augment, blends
from megafusion.progress import progress_bar
from megafusion.storage import read_lines

LOGIT_SCALE = 16.0


def read_pack(*packs: Path) -> dict[str, Tensor]:
    """Images [3, 64, 64] in [0, 1] by key, from webdataset tars."""
    images = {}
    for pack in packs:
        if not pack.is_file():
            raise UserError(f"{pack}: no such file; build it with python -m data_prep.emoji.build")
        for pair in tar_pairs(pack):
            pixels = np.array(open_rgb(pair.image))
            if pixels.shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
                raise UserError(f"{pack}: {pair.key} is not 64 x 64 pixels; rebuild the pack")
            images[pair.key] = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    return images


def read_keys(path: Path, images_by_key: dict[str, Tensor]) -> list[str]:
    """Keys of a file, one per line; UserError naming those that the pack lacks."""
    keys = read_lines(path)
    missing = [key for key in keys if key not in images_by_key]
    if missing:
        raise UserError(f"{path}: not in the pack: {missing[:5]}")
    return keys


def split_others(images_by_key: dict[str, Tensor], keys: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The pack's other images, as examples of `other`: for training, and every eighth held out.

    Excludes those that look like a concept, such as a snowman without snow: an RMS difference below 0.12.
    """
    concepts = torch.stack([images_by_key[key] for key in keys]).flatten(1)
    others = torch.stack([images_by_key[key] for key in sorted(images_by_key.keys() - set(keys))])
    distance = torch.cdist(others.flatten(1), concepts).amin(1) / concepts.shape[1] ** 0.5
    others = others[distance >= 0.12]
    held_out = torch.arange(len(others)) % 8 == 0
    return others[~held_out], others[held_out]


def plain_images(num: int, random: torch.Generator) -> Tensor:
    """Images [num, 3, 64, 64] without a concept: one color, often white, or coarse random colors."""
    size = 8 if torch.rand(1, generator=random) < 0.5 else 1
    colors = torch.rand(num, 3, size, size, generator=random)
    colors[: num // 3] = 1.0
    return F.interpolate(colors, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")


def train_classifier(
    images_by_key: dict[str, Tensor], keys: Sequence[str], num_steps: int, seed: int = 0
) -> ImageClassifier:
    """Train the network and the references: the concepts' images to their keys, the rest to `other`.

    `other` is a class with the fixed logit of a cosine of REJECTION_COSINE, so the threshold is trained.
    Half-blends have both images as targets. The same arguments give bitwise identical weights.
    """
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    classifier = ImageClassifier(keys)
    images = torch.stack([images_by_key[key] for key in keys])
    others, _ = split_others(images_by_key, keys)
    num, other = len(keys), len(keys)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.01)
    with progress_bar() as progress:
        task = progress.add_task("classifier", total=num_steps, losses="")
        for step in range(num_steps):
            optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 50) * (1 - step / num_steps)
            blended, partner = blends(images, random)
            mixed = torch.randperm(num, generator=random)[: num // 4]
            negatives = others[torch.randint(len(others), (num // 2,), generator=random)]
            plain = plain_images(num // 16, random)
            batch = torch.cat([images, blended[mixed], negatives, plain])
            first = torch.cat([torch.arange(num), mixed, torch.full((len(negatives) + len(plain),), other)])
            second = first.clone()
            second[num : num + len(mixed)] = partner[mixed]
            order = torch.randperm(len(batch), generator=random)
            cosines = classifier(augment(batch[order], random))
            logits = F.pad(cosines, (0, 1), value=REJECTION_COSINE) * LOGIT_SCALE
            loss = (F.cross_entropy(logits, first[order]) + F.cross_entropy(logits, second[order])) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 20 == 0:
                progress.update(task, completed=step + 1, losses=f"loss {loss.item():.3f}")
    return classifier.eval().requires_grad_(False)


def measure(classifier: ImageClassifier, images_by_key: dict[str, Tensor]) -> dict[str, float]:
    """Accuracy on the concepts' real images under each corruption, the fraction of half-blends classified as
    one of their two, and the false-positive rate on held-out `other` images, clean and blurred with noise.
    """
    keys = classifier.keys
    images = torch.stack([images_by_key[key] for key in keys])
    metrics = {name: classifier.accuracy(images, keys, name) for name in CORRUPTIONS}
    blended, partner = blends(images, torch.Generator().manual_seed(0))
    found = zip(classifier.classify(blended), keys, partner.tolist(), strict=True)
    metrics["half-blends to one of the two"] = sum(f in (key, keys[p]) for f, key, p in found) / len(keys)
    _, held_out = split_others(images_by_key, keys)
    for name in ("clean", "blur and noise"):
        kept = classifier.accuracy(held_out, [OTHER] * len(held_out), name)
        # As the committed weights' metadata name it.
        metrics[f"other pictures taken for a concept, {name}"] = 1 - kept
    white = torch.ones(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    metrics["white taken for a concept"] = float(classifier.classify(white) != [OTHER])
    return {name: round(value, 4) for name, value in metrics.items()}


app = typer.Typer(add_completion=False, help="Train or measure the classifier of generated images.")
PackOption = Annotated[list[Path], typer.Option(help="webdataset tar of 64 x 64 images; repeat for several.")]


@app.command()
def train(
    pack: PackOption,
    keys: Annotated[Path, typer.Option(help="Keys of the concepts, one per line.")],
    out: Annotated[Path, typer.Option(help="safetensors file to write.")],
    num_steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 700,
) -> None:
    """Train on the real images, print the metrics, and store them with the weights."""
    images_by_key = read_pack(*pack)
    classifier = train_classifier(images_by_key, read_keys(keys, images_by_key), num_steps)
    classifier.metrics = measure(classifier, images_by_key)
    classifier.save(out)
    _print(classifier.metrics)


@app.command("measure")
def measure_command(
    pack: PackOption, weights: Annotated[Path, typer.Option(help="safetensors file that `train` wrote.")]
) -> None:
    """Measure stored weights again."""
    _print(measure(ImageClassifier.load(weights), read_pack(*pack)))


def _print(metrics: dict[str, float]) -> None:
    for name, value in metrics.items():
        typer.echo(f"{value:.4f}  {name}")


if __name__ == "__main__":
    with exit_on_user_error():
        app()
