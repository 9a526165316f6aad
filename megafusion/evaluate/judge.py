"""The judge of drawn images: a classifier that is proved on the real ones before it judges."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megafusion.errors import UserError
from megafusion.evaluate.classifier import ImageClassifier
from megafusion.evaluate.distortions import CORRUPTIONS, augment, blends, corrupt

MIN_RETRIEVAL = 0.95
"""Share of the real images whose concept and style a judge must find, under each distortion."""
SEED = 20_001
"""Of the distortions; training uses other seeds."""
NUM_VARIANTS = 4
"""Random variants of each image."""
BLEND_SHARE = 0.7
"""An equal blend shows neither image more than the other, so that no verdict on it is wrong."""


def split_key(key: str) -> tuple[str, str]:
    """Concept and style of a key: what is before its last hyphen, and behind it."""
    concept, _, style = key.rpartition("-")
    return concept, style


def retrieval(classifier: ImageClassifier, images_N3HW: Tensor, keys: Sequence[str]) -> dict[str, float]:
    """Share of real images, in [0, 1], whose concept, and whose style, the classifier finds when distorted.

    Under each of CORRUPTIONS; as random variants; and blended with another, which has the smaller share.
    """
    random = torch.Generator().manual_seed(SEED)
    cases = {name: (corrupt(images_N3HW, name, SEED), keys) for name in CORRUPTIONS}
    order = torch.cat([torch.randperm(len(keys), generator=random) for _ in range(NUM_VARIANTS)])
    variants = torch.cat([augment(images_N3HW[part], random) for part in order.split(len(keys))])
    cases["random variants"] = variants, [keys[i] for i in order.tolist()]
    cases[f"blends of {BLEND_SHARE:.0%}"] = blends(images_N3HW, random, BLEND_SHARE)[0], keys
    found = {}
    for name, (images, wanted) in cases.items():
        pairs = [
            (split_key(a), split_key(b)) for a, b in zip(classifier.classify(images), wanted, strict=True)
        ]
        for part, what in enumerate(("concept", "style")):
            found[f"{what}, {name}"] = sum(a[part] == b[part] for a, b in pairs) / len(pairs)
    return found


def prove(
    path: Path, classifier: ImageClassifier, images_N3HW: Tensor, keys: Sequence[str]
) -> dict[str, float]:
    """The judge's retrieval of the real images. UserError naming each figure below MIN_RETRIEVAL."""
    if unknown := sorted(set(keys) - set(classifier.keys)):
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(f"judge: {path}: does not know {unknown[0]}{more}; train it on these images")
    found = retrieval(classifier, images_N3HW, keys)
    if low := {name: share for name, share in found.items() if share < MIN_RETRIEVAL}:
        figures = "; ".join(f"{name}: {share:.3f}" for name, share in low.items())
        raise UserError(
            f"judge: {path}: finds too few of the real images to judge drawn ones, below {MIN_RETRIEVAL} "
            f"({figures}); train it for more steps, or leave it out"
        )
    return found
