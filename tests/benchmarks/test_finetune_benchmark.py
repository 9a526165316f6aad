"""benchmarks/finetune.py: its pairs are 64 that the quickstart's model has not seen."""

import runpy

from data_prep.emoji.build import starter_keys
from data_prep.readers.webdataset import tar_pairs
from tests.support.small import PACK, ROOT


def test_its_pairs_are_new_to_the_quickstart(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    concepts = runpy.run_path(str(ROOT / "benchmarks/finetune.py"))["CONCEPTS"].split(",")
    captions = {pair.key: pair.caption.decode() for pair in tar_pairs(PACK)}
    keys = starter_keys(captions, [concept.strip() for concept in concepts])
    known = (ROOT / "data_prep/emoji/starter.txt").read_text().split()
    assert len(set(keys)) == 64
    assert not set(keys) & set(known)
