"""The captions suite: what the model writes for images, against reference captions."""

import re
import shutil
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from megafusion.errors import UserError
from megafusion.evaluate.annotations import AnnotatedImage
from megafusion.evaluate.config import EvaluateConfig
from megafusion.evaluate.groups import annotated_images, by_group, sampling_of
from megafusion.evaluate.suite import Metrics
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.sequence.text import clean_text


class Captions:
    """Exact match with a reference caption, and CIDEr by pycocoevalcap."""

    name = "captions"

    def __init__(self, config: EvaluateConfig):
        self.items: Sequence[AnnotatedImage]
        self.items, self.recipe = annotated_images(config)
        self._config = config
        import_cider()
        if config.words == "ptb" and not shutil.which("java"):
            raise UserError("words: ptb needs Java, and there is none; install a JRE, or use words=simple")

    def measure(
        self, pipeline: TransfusionPipeline, first: int, items: Sequence[AnnotatedImage]
    ) -> list[dict]:
        """The caption of each image."""
        seeds = [self._config.seed + first + number for number in range(len(items))]
        sampling = sampling_of(pipeline, self._config)
        texts = pipeline.describe([item.path for item in items], seed=seeds, sampling=sampling)
        return [{"image_id": item.id, "caption": text} for item, text in zip(items, texts, strict=True)]

    def summarize(self, records: list[dict], device: Any = None) -> dict[str, Metrics]:
        """Metrics by group; CIDEr's document frequencies are those of all images."""
        texts = [record["caption"] for record in records]
        exact = [clean_text(text) in item.captions for text, item in zip(texts, self.items, strict=True)]
        scores = cider([item.captions for item in self.items], texts, self._config.words)
        return {
            group: {
                "images": len(chosen),
                "exact_match": fmean(exact[i] for i in chosen),
                "cider": fmean(scores[i] for i in chosen),
            }
            for group, chosen in by_group(self.items).items()
        }


def cider(references: Sequence[Sequence[str]], texts: Sequence[str], words: str = "simple") -> list[float]:
    """CIDEr of each text against its references, by pycocoevalcap: 0 to 10.

    Of a single image it is 0, because CIDEr weighs words by how few images have them.
    """
    divide = _ptb if words == "ptb" else _simple
    numbered = divide(dict(enumerate(references))), divide({i: [text] for i, text in enumerate(texts)})
    return [float(score) for score in import_cider()().compute_score(*numbered)[1]]


def import_cider() -> type:
    """pycocoevalcap's class. UserError where it is not installed."""
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise UserError(
            f"captions: CIDEr needs pycocoevalcap; pip install 'megafusion[eval]' ({error})"
        ) from error
    return Cider


def _simple(texts: dict[int, Sequence[str]]) -> dict[int, list[str]]:
    return {i: [" ".join(re.findall(r"\w+", text.lower())) for text in own] for i, own in texts.items()}


def _ptb(texts: dict[int, Sequence[str]]) -> dict[int, list[str]]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    return PTBTokenizer().tokenize({i: [{"caption": text} for text in own] for i, own in texts.items()})
