"""A picture classifier that names the concept and style of a generated picture.

It shares nothing with the generator: a small convolutional network embeds a 64 x 64 picture, and the nearest
of the concepts' reference embeddings, by cosine, names it; a picture near none of them is `other`.
"""

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from webdataset import WebDataset

from megafusion.errors import UserError
from megafusion.progress import progress_bar
from megafusion.resilience.exit_status import ExitStatus
from megafusion.storage import write_file

IMAGE_SIZE = 64
CHANNELS = (24, 48, 96, 128)
EMBEDDING_SIZE = 64
OTHER = "other"
"""The answer for a picture that shows none of the concepts."""
REJECTION_COSINE = 0.5
"""A picture must be at least this near to a reference to be named after it."""
LOGIT_SCALE = 16.0
METADATA_KEY = "classifier"
"""One key, as safetensors writes several in no fixed order, and the file should repeat byte for byte."""

BLUR_SIGMA = 2.0
"""Pixels."""
NOISE_STD = 0.1
SHIFT_PIXELS = 2
CORRUPTIONS = ("clean", "blur", "noise", "blur and noise", "shift")


class ImageClassifier(nn.Module):
    """Names pictures after the nearest of K references.

    `figures` holds the accuracies measured when the weights were made.
    """

    def __init__(self, keys: Sequence[str], figures: dict[str, float] | None = None) -> None:
        super().__init__()
        self.keys = list(keys)
        self.figures = figures or {}
        layers: list[nn.Module] = []
        for num_in, num_out in zip((3, *CHANNELS), CHANNELS, strict=False):
            conv = nn.Conv2d(num_in, num_out, 3, stride=2, padding=1, bias=False)
            layers += [conv, nn.GroupNorm(8, num_out), nn.SiLU()]
        # 2 x 2 rather than a global mean: where things are tells a face from its parts.
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.project = nn.Linear(4 * CHANNELS[-1], EMBEDDING_SIZE)
        # The references are trained with the network: each is the common direction of one picture's variants.
        self.references = nn.Parameter(torch.randn(len(keys), EMBEDDING_SIZE))

    @classmethod
    def load(cls, path: Path | str) -> "ImageClassifier":
        """Read the weights that `save` wrote; UserError naming the file when they are not such weights."""
        try:
            with safe_open(path, "pt") as file:
                stored = json.loads(file.metadata()[METADATA_KEY])
                classifier = cls(stored["keys"], stored["figures"])
                classifier.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(
                f"{path}: no classifier weights: {error}; "
                "make them with python -m data_prep.emoji.classifier train"
            ) from error
        return classifier.eval().requires_grad_(False)

    def save(self, path: Path) -> None:
        """Write weights, keys and figures, whole or not at all."""
        stored = json.dumps({"keys": self.keys, "figures": self.figures})
        write_file(path, save(self.state_dict(), {METADATA_KEY: stored}))

    def forward(self, images_N3HW: Tensor) -> Tensor:
        """Cosine to each reference, [N, K], of pictures [N, 3, 64, 64] with values in [0, 1]."""
        embeddings = F.normalize(self.project(self.features(images_N3HW - 0.5)), dim=-1)
        return embeddings @ F.normalize(self.references, dim=-1).T

    @torch.no_grad()
    def classify(self, images_N3HW: Tensor) -> list[str]:
        """The key of each picture of [N, 3, 64, 64] in [0, 1], or `other` when it is near to none."""
        if images_N3HW.ndim != 4 or images_N3HW.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise UserError(f"pictures of shape {tuple(images_N3HW.shape)}: resize them to [N, 3, 64, 64]")
        cosines, nearest = self(images_N3HW.float()).max(-1)
        found = zip(cosines.tolist(), nearest.tolist(), strict=True)
        return [self.keys[index] if cosine >= REJECTION_COSINE else OTHER for cosine, index in found]

    def accuracy(
        self, images_N3HW: Tensor, keys: Sequence[str], corruption: str = "clean", seed: int = 0
    ) -> float:
        """Share of the pictures that are given their own key after one of CORRUPTIONS."""
        found = self.classify(corrupt(images_N3HW, corruption, seed))
        return sum(a == b for a, b in zip(found, keys, strict=True)) / len(found)


def corrupt(images_N3HW: Tensor, corruption: str, seed: int = 0) -> Tensor:
    """Pictures [N, 3, H, W] in [0, 1] damaged in one of the ways of CORRUPTIONS, at the strength measured."""
    random = torch.Generator().manual_seed(seed)
    images = images_N3HW
    match corruption:
        case "clean":
            pass
        case "blur":
            images = blur(images, BLUR_SIGMA)
        case "noise":
            images = images + NOISE_STD * torch.randn(images.shape, generator=random)
        case "blur and noise":
            images = blur(images, BLUR_SIGMA) + NOISE_STD * torch.randn(images.shape, generator=random)
        case "shift":
            padded = F.pad(images, (SHIFT_PIXELS,) * 4, value=1.0)
            offsets = (2 * SHIFT_PIXELS * torch.randint(0, 2, (len(images), 2), generator=random)).tolist()
            height, width = images.shape[-2:]
            moved = [p[:, y : y + height, x : x + width] for p, (y, x) in zip(padded, offsets, strict=True)]
            images = torch.stack(moved)
        case _:
            raise ValueError(f"corruption {corruption!r}: use one of {', '.join(CORRUPTIONS)}")
    return images.clamp(0, 1)


def blur(images_N3HW: Tensor, sigma: float) -> Tensor:
    """Gaussian blur, `sigma` in pixels; the border is repeated outwards. Square pictures only."""
    radius = max(1, round(3 * sigma))
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    size = images_N3HW.shape[-1]
    sources = (torch.arange(size)[:, None] + offsets).clamp(0, size - 1)
    # As one matrix a side: at this size, far faster on CPU than a convolution a channel.
    matrix = torch.zeros(size, size).scatter_add(1, sources, (weights / weights.sum()).expand(size, -1))
    return matrix @ images_N3HW @ matrix.T


def augment(images_N3HW: Tensor, random: torch.Generator) -> Tensor:
    """Variants [N, 3, H, W] of pictures as a generator may draw them: moved, bent, tinted, coarse, noisy."""
    num = len(images_N3HW)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(num, *shape, generator=random)

    scale, angle = uniform(0.85, 1.2), uniform(-0.15, 0.15)
    shift = uniform(-0.12, 0.12, 2)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    affine = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], -1).view(num, 2, 3)
    bend = 0.04 * torch.randn(num, 2, 5, 5, generator=random)
    grid = F.affine_grid(affine, list(images_N3HW.shape), align_corners=False)
    grid = grid + F.interpolate(bend, size=grid.shape[1:3], mode="bicubic", align_corners=True).permute(
        0, 2, 3, 1
    )
    # Sampling outside gives 0; the pictures stand on white, so move white to 0 meanwhile.
    images = F.grid_sample(images_N3HW - 1, grid, align_corners=False) + 1
    images = images * uniform(0.85, 1.1, 3, 1, 1) + uniform(-0.06, 0.06, 1, 1, 1)

    # Each kind of damage to one run of the shuffled batch: resolution and blur act on whole tensors.
    quarter = -(-num // 4)
    parts = list(images.split(quarter))
    for index, part in enumerate(parts):
        draw = torch.rand(2, generator=random)
        if index == 1:
            size = int(12 + 36 * draw[0])
            coarse = F.interpolate(part, size=(size, size), mode="bilinear", antialias=True)
            parts[index] = F.interpolate(
                coarse, size=part.shape[-2:], mode="bilinear" if draw[1] < 0.7 else "nearest"
            )
        elif index >= 2:
            parts[index] = blur(part, 0.3 + 2.2 * draw[0].item())
    images = torch.cat(parts)
    for size, strength in ((IMAGE_SIZE, 0.13), (IMAGE_SIZE // 8, 0.08)):
        # Fine noise, and a constant error a patch: what is left of unfinished denoising.
        noise = torch.randn(num, 3, size, size, generator=random) * uniform(0, strength, 1, 1, 1)
        images = images + F.interpolate(noise, size=images.shape[-2:])
    return images.clamp(0, 1)


def blends(images_N3HW: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Half-and-half blends [N, 3, H, W] of each picture with another, and the other's index [N]."""
    num = len(images_N3HW)
    partner = (torch.arange(num) + torch.randint(1, num, (num,), generator=random)) % num
    return (images_N3HW + images_N3HW[partner]) / 2, partner


def read_pack(pack: Path) -> dict[str, Tensor]:
    """Pictures [3, 64, 64] in [0, 1] by key, from a webdataset tar."""
    if not pack.is_file():
        raise UserError(f"{pack}: no such file; build it with python -m data_prep.emoji.build")
    pictures = {}
    for sample in WebDataset(str(pack), shardshuffle=False, empty_check=False):
        pixels = np.asarray(Image.open(io.BytesIO(sample["webp"])).convert("RGB"))
        if pixels.shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
            raise UserError(f"{pack}: {sample['__key__']} is not 64 x 64 pixels; rebuild the pack")
        pictures[sample["__key__"]] = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
    return pictures


def read_keys(path: Path, pictures: dict[str, Tensor]) -> list[str]:
    """The keys a file names, one a line; UserError naming those that the pack lacks."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the keys of the concepts, one a line")
    keys = path.read_text().split()
    missing = [key for key in keys if key not in pictures]
    if missing or not keys:
        raise UserError(f"{path}: {f'not in the pack: {missing[:5]}' if missing else 'names no keys'}")
    return keys


def split_others(pictures: dict[str, Tensor], keys: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The pack's other pictures as examples of `other`: for training, and every eighth held out.

    Left out are those that look like a concept, such as a snowman without snow: an RMS difference under 0.12.
    """
    wanted = torch.stack([pictures[key] for key in keys]).flatten(1)
    others = torch.stack([pictures[key] for key in sorted(pictures.keys() - set(keys))])
    distance = torch.cdist(others.flatten(1), wanted).amin(1) / wanted.shape[1] ** 0.5
    others = others[distance >= 0.12]
    held_out = torch.arange(len(others)) % 8 == 0
    return others[~held_out], others[held_out]


def plain_images(num: int, random: torch.Generator) -> Tensor:
    """Pictures [num, 3, 64, 64] of one colour, often white, or of coarse random colours: nothing to see."""
    size = 8 if torch.rand(1, generator=random) < 0.5 else 1
    colours = torch.rand(num, 3, size, size, generator=random)
    colours[: num // 3] = 1.0
    return F.interpolate(colours, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")


def train_classifier(
    pictures: dict[str, Tensor], keys: Sequence[str], num_steps: int, seed: int = 0
) -> ImageClassifier:
    """Fit the network and the references: own pictures to their key, the rest of the pack to `other`.

    `other` is the class of a fixed logit, that of a cosine of REJECTION_COSINE: so the threshold is trained.
    Half-blends have both pictures as targets. The same arguments give the same weights, bit for bit.
    """
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    classifier = ImageClassifier(keys)
    images = torch.stack([pictures[key] for key in keys])
    others, _ = split_others(pictures, keys)
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


def measure(classifier: ImageClassifier, pictures: dict[str, Tensor]) -> dict[str, float]:
    """Shares that say whether the classifier can be trusted: right answers on the concepts' real pictures
    under each corruption, half-blends given to one of their two, and `other` pictures not seen in training
    that are taken for a concept, as they are and blurred with noise.
    """
    keys = classifier.keys
    images = torch.stack([pictures[key] for key in keys])
    figures = {name: classifier.accuracy(images, keys, name) for name in CORRUPTIONS}
    blended, partner = blends(images, torch.Generator().manual_seed(0))
    found = zip(classifier.classify(blended), keys, partner.tolist(), strict=True)
    figures["half-blends to one of the two"] = sum(f in (key, keys[p]) for f, key, p in found) / len(keys)
    _, held_out = split_others(pictures, keys)
    for name in ("clean", "blur and noise"):
        kept = classifier.accuracy(held_out, [OTHER] * len(held_out), name)
        figures[f"other pictures taken for a concept, {name}"] = 1 - kept
    white = torch.ones(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    figures["white taken for a concept"] = float(classifier.classify(white) != [OTHER])
    return {name: round(value, 4) for name, value in figures.items()}


app = typer.Typer(add_completion=False, help="Train or measure the classifier of generated pictures.")
PackOption = Annotated[Path, typer.Option(help="webdataset tar of 64 x 64 pictures.")]


@app.command()
def train(
    pack: PackOption,
    keys: Annotated[Path, typer.Option(help="Keys of the concepts, one a line.")],
    out: Annotated[Path, typer.Option(help="safetensors file to write.")],
    num_steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 700,
) -> None:
    """Train on the real pictures, print the figures, and store them with the weights."""
    pictures = read_pack(pack)
    classifier = train_classifier(pictures, read_keys(keys, pictures), num_steps)
    classifier.figures = measure(classifier, pictures)
    classifier.save(out)
    _print(classifier.figures)


@app.command("measure")
def measure_command(
    pack: PackOption, weights: Annotated[Path, typer.Option(help="safetensors file that `train` wrote.")]
) -> None:
    """Measure stored weights again."""
    _print(measure(ImageClassifier.load(weights), read_pack(pack)))


def _print(figures: dict[str, float]) -> None:
    for name, value in figures.items():
        typer.echo(f"{value:.4f}  {name}")


if __name__ == "__main__":
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(ExitStatus.REFUSED)
