"""Every family that is supported gives the logits and the greedy text of transformers' own class."""

import pytest
import torch

from megafusion.generate.decoder import Decoder
from tests.support.generation import full_hidden
from tests.support.hub import FAMILIES, load_here, make_folder
from tests.support.texts import documents, pack

LENGTHS = [[7, 21, 4], [33], [1, 30]]  # of the documents of each row


@pytest.fixture(params=FAMILIES, ids=str)
def models(request, tmp_path):
    theirs = make_folder(tmp_path / "hub", request.param)
    return theirs, load_here(tmp_path / "hub")


@torch.no_grad()
def test_logits_are_those_of_transformers(models):
    """Documents of unlike lengths packed into rows here, and padded to one length there."""
    theirs, ours = models
    rows = [documents(lengths, seed) for seed, lengths in enumerate(LENGTHS)]
    hidden, _ = full_hidden(ours, pack(rows))
    logits = ours.tail.head(hidden)
    flat = [document for row in rows for document in row]
    tokens = torch.zeros(len(flat), max(map(len, flat)), dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for number, document in enumerate(flat):
        tokens[number, : len(document)] = torch.from_numpy(document.tokens)
        mask[number, : len(document)] = 1
    expected = theirs(input_ids=tokens, attention_mask=mask).logits
    number = 0
    for row, found in zip(rows, logits, strict=True):
        start = 0
        for document in row:
            own = expected[number, : len(document)]
            assert own.std() > 0.1  # not so small that anything is within the limit
            torch.testing.assert_close(found[start : start + len(document)], own, rtol=0, atol=1e-5)
            start, number = start + len(document), number + 1


@torch.no_grad()
def test_greedy_text_is_that_of_transformers(models):
    theirs, ours = models
    prompts = documents([3, 17, 9], seed=9)
    longest, num_new = 17, 64
    tokens = torch.zeros(3, longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):  # transformers pads on the left
        tokens[row, -len(prompt) :] = torch.from_numpy(prompt.tokens)
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(
        input_ids=tokens,
        attention_mask=(tokens > 0).long(),
        do_sample=False,
        max_new_tokens=num_new,
        pad_token_id=0,
    )[:, longest:]
    decoder = Decoder(ours)
    cache = decoder.new_cache(3, longest + num_new + 1)
    logits = decoder.read_prompts(cache, pack([[p] for p in prompts]), torch.tensor([3, 17, 9]))
    found = []
    for _ in range(num_new):
        found.append(logits.argmax(-1))
        logits = decoder.read_tokens(cache, found[-1])
    assert torch.stack(found, 1).tolist() == expected.tolist()
    assert len(expected.unique()) > 5
