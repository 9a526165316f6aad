"""Each metric against a library, or against its formula in plain NumPy, on fixed inputs: equal to 1e-4."""

import math
import re
from collections import Counter

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megafusion.errors import UserError
from megafusion.evaluate.captions import cider
from megafusion.evaluate.distances import frechet_distance, kernel_distance
from megafusion.evaluate.perplexity import Perplexity, text_nats
from megafusion.evaluate.reconstruction import reconstruct, reconstruction_metrics
from megafusion.sequence.document import Segment, flatten
from tests.support.marks import full

REFERENCES = [
    ["a red apple on a table", "an apple, red and round"],
    ["a dog runs over the grass", "the dog is running"],
    ["a small house with a red door", "a house beside a tree", "the house has a door"],
    ["two boats on the sea", "boats at sea near the shore"],
]
TEXTS = ["a red apple on the table", "a cat sits on the grass", "a house with a red door", "boats"]


def plain_cider(references: list[list[str]], texts: list[str]) -> list[float]:
    """CIDEr-D of Vedantam et al., arXiv 1411.5726, section 6, from the paper: n of 1 to 4, sigma 6."""

    def grams(text: str, n: int) -> Counter:
        words = re.findall(r"\w+", text.lower())
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    scores = []
    for own, text in zip(references, texts, strict=True):
        total = 0.0
        for n in range(1, 5):
            seen_in = Counter(g for each in references for g in set().union(*(grams(r, n) for r in each)))

            def weights(text: str, n: int = n, seen_in: Counter = seen_in) -> dict:
                idf = {g: math.log(len(references) / max(1, seen_in[g])) for g in grams(text, n)}
                return {g: count * idf[g] for g, count in grams(text, n).items()}

            a = weights(text)
            for reference in own:
                b = weights(reference)
                norms = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
                overlap = sum(min(a[g], b.get(g, 0)) * b.get(g, 0) for g in a)
                # pycocoevalcap counts pairs of words in the place of words for the penalty of lengths.
                delta = grams(text, 2).total() - grams(reference, 2).total()
                if norms:
                    total += 10 / 4 / len(own) * overlap / norms * math.exp(-(delta**2) / (2 * 6**2))
        scores.append(total)
    return scores


def test_cider_is_that_of_the_library_and_of_the_paper():
    assert cider(REFERENCES, TEXTS) == pytest.approx(plain_cider(REFERENCES, TEXTS), abs=1e-4)
    perfect = cider([[each[0]] for each in REFERENCES], [each[0] for each in REFERENCES])
    assert perfect == pytest.approx([10] * 4, abs=1e-4)
    assert cider([["red apple"], ["dog"]], ["Red, apple!", "cat"])[1] == 0


def normal(num: int, size: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return scale * torch.randn(num, size, generator=random, dtype=torch.float64) + seed


# torchmetrics takes seconds to import, so one case stands for the rest.
@pytest.mark.parametrize("num", [6, *full(40)])
def test_the_frechet_distance_is_scipys(num):
    """Also with fewer images than features, where the covariances are singular."""
    real, drawn = normal(num, 12, 0), normal(num, 12, 1, 2.0)
    means = [x.numpy().mean(0) for x in (real, drawn)]
    covariances = [np.cov(x.numpy(), rowvar=False) for x in (real, drawn)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(sum(covariances)) - 2 * np.trace(root).real
    assert frechet_distance(real, drawn) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-4)


@pytest.mark.full
def test_the_kernel_distance_is_the_unbiased_mmd():
    real, drawn = normal(20, 8, 0), normal(20, 8, 1)

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / 8 + 1) ** 3

    within = sum((kernel(x, x).sum() - kernel(x, x).diag().sum()) / (20 * 19) for x in (real, drawn))
    expected = float(within - 2 * kernel(real, drawn).mean())
    found = kernel_distance(real, drawn, 3, 1000)
    assert found == pytest.approx((expected, 0), rel=1e-4, abs=1e-4)
    state = torch.random.get_rng_state()
    assert kernel_distance(real, drawn, 3, 10) == kernel_distance(real, drawn, 3, 10)
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(UserError, match="1 real and 20 drawn images: give 2"):
        frechet_distance(real[:1], drawn)


def test_perplexity_is_that_of_each_text_alone(pipeline, config):
    """In a batch and cut into rows, against the whole model's loss on one document."""
    suite = Perplexity(config)
    records = suite.measure(pipeline, 0, suite.items)
    model, tokenizer = pipeline.model, pipeline.tokenizer
    for text, record in zip(suite.items, records, strict=True):
        document = flatten([Segment("tokens", tokenizer.encode(text))], tokenizer, model.config.patches)
        nats, has_target = text_nats(model, [document])
        assert record["nats"] == pytest.approx(nats.sum().item(), rel=1e-5)
        assert record["tokens"] == has_target.sum() == len(tokenizer.encode(text)) + 1
        assert record["bytes"] == len(text.encode())
    metrics = suite.summarize(records)["all"]
    tokens, size = sum(r["tokens"] for r in records), sum(r["bytes"] for r in records)
    assert metrics["bits_per_byte"] * size == pytest.approx(metrics["bits_per_token"] * tokens)
    assert metrics["perplexity"] == pytest.approx(2 ** metrics["bits_per_token"])


def test_a_long_text_is_cut_and_loses_no_target(pipeline, config):
    suite = Perplexity(config)
    pipeline.config = pipeline.config.model_copy(update={"sequence_length": 7})
    (record,) = suite.measure(pipeline, 0, suite.items[:1])
    tokens = pipeline.tokenizer.encode(suite.items[0])
    assert record["tokens"] == len(tokens) + 1 > 7
    document = flatten([Segment("tokens", tokens)], pipeline.tokenizer, pipeline.config.model.patches)
    whole = text_nats(pipeline.model, [document])[0][0]
    assert record["nats"] != pytest.approx(whole.sum().item(), rel=1e-4), (
        "later pieces see nothing before them"
    )


@pytest.mark.parametrize("library", [*full("torchmetrics"), "loss"])
def test_nats_are_the_models_own_loss(pipeline, config, library):
    from megafusion.sequence.packing import SequenceShape, collate, pack_row

    model, texts = pipeline.model, Perplexity(config).items
    documents = [
        flatten(
            [Segment("tokens", pipeline.tokenizer.encode(text))], pipeline.tokenizer, model.config.patches
        )
        for text in texts
    ]
    shape = SequenceShape(
        64, 1, model.config.patches, model.config.latent_channels, model.config.latent_sizes
    )
    batch = collate([pack_row([document], shape) for document in documents])
    nats, has_target = text_nats(model, documents)
    mean = float(nats.sum() / has_target.sum())
    with torch.no_grad():
        if library == "loss":
            assert mean == pytest.approx(model(batch).text.item(), abs=1e-5)
            return
        from torchmetrics.text import Perplexity as Reference

        from tests.support.generation import full_hidden

        logits = model.tail.head(full_hidden(model, batch)[0])
        expected = Reference(ignore_index=-100)(logits, batch.labels)
    assert math.exp(mean) == pytest.approx(expected.item(), rel=1e-4)


@settings(max_examples=20)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_psnr_is_the_formula(errors):
    squared = torch.tensor(errors, dtype=torch.float64)
    found = reconstruction_metrics(squared, squared.sqrt())
    clamped = np.maximum(np.array(errors), 1e-10)
    assert found["psnr"] == pytest.approx((-10 * np.log10(clamped)).mean())
    assert found["psnr_of_mean"] == pytest.approx(-10 * np.log10(clamped.mean()))


@pytest.mark.full
def test_psnr_is_that_of_torchmetrics(codec):
    from torchmetrics.image import PeakSignalNoiseRatio

    random = torch.Generator().manual_seed(0)
    pixels = torch.rand(5, 3, 32, 32, generator=random) * 2 - 1
    squared, absolute, decoded = reconstruct(codec, pixels)
    found = reconstruction_metrics(squared, absolute)
    each = PeakSignalNoiseRatio(data_range=1.0, reduction="elementwise_mean", dim=(1, 2, 3))
    assert found["psnr"] == pytest.approx(each(decoded / 2 + 0.5, pixels / 2 + 0.5).item(), abs=1e-4)
    of_mean = PeakSignalNoiseRatio(data_range=1.0)(decoded / 2 + 0.5, pixels / 2 + 0.5)
    assert found["psnr_of_mean"] == pytest.approx(of_mean.item(), abs=1e-4)
