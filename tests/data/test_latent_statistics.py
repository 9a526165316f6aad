"""Latents far from zero mean and unit deviation are judged, and the factors that mend them are right."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megafusion.data.document_format import StoredDocument
from megafusion.data.latent_statistics import latent_statistics
from megafusion.data.manifest import Manifest
from megafusion.sequence.document import Segment


def manifest(scale: float, shift: float) -> Manifest:
    return Manifest(
        kind="pair",
        num_tokens=0,
        num_images=0,
        tokenizer_sha256="",
        latent_scale=scale,
        latent_shift=shift,
        provenance={},
        shards=(),
    )


def documents(mean: float, deviation: float, log_variance: float) -> list[StoredDocument]:
    generator = np.random.default_rng(0)
    found = []
    for _ in range(8):
        means = mean + deviation * generator.standard_normal((4, 16, 16))
        moments = np.stack([means, np.full_like(means, log_variance)]).astype(np.float16)
        segments = (Segment("tokens", np.zeros(3, np.int32)), Segment("moments", moments))
        found.append(StoredDocument({}, segments))
    return found


@given(
    mean=st.floats(-3, 3),
    deviation=st.floats(0.1, 8),
    log_variance=st.floats(-12, 1),
    scale=st.floats(0.01, 20),
    shift=st.floats(-3, 3),
)
def test_statistics_are_those_of_sampled_and_normalized_latents(mean, deviation, log_variance, scale, shift):
    given_documents = documents(mean, deviation, log_variance)
    found = latent_statistics(given_documents, manifest(scale, shift))
    assert found is not None
    total = (deviation**2 + np.exp(log_variance)) ** 0.5
    assert found.deviation == pytest.approx(total * scale, rel=0.05)
    assert found.mean == pytest.approx((mean - shift) * scale, abs=0.1 * total * scale)
    mended = latent_statistics(given_documents, manifest(found.scaling_factor, found.shift_factor))
    assert mended is not None
    assert (mended.mean, mended.deviation) == pytest.approx((0, 1), abs=1e-6)
    assert mended.warning is None


@pytest.mark.parametrize(
    ("scale", "shift", "is_far"),
    [(1, 0, False), (1.9, 0, False), (0.6, 0, False), (0.039, 0, True), (3, 0, True), (1, 1.5, True)],
)
def test_what_is_far_from_them_is_a_warning(scale, shift, is_far):
    found = latent_statistics(documents(0, 1, -12), manifest(scale, shift))
    assert found is not None
    assert (found.warning is not None) == is_far
    if scale == 0.039:
        assert re.search(r"standard deviation 0\.03[89]\d*, far", found.warning)
        assert re.search(r"set scaling_factor to (1|1\.0\d*|0\.99\d*) and", found.warning)


def test_documents_without_latents_are_not_judged():
    assert latent_statistics([StoredDocument({}, ())], manifest(1, 0)) is None
