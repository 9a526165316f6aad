"""A vocabulary that does not divide evenly: shards of a multiple of 64 tokens, the last one smaller."""

import pytest
import torch
from torch import nn

from megafusion.model.config import ModelConfig
from megafusion.model.transfusion import Transfusion
from megafusion.objective.config import ObjectiveConfig
from megafusion.objective.losses import cross_entropy
from megafusion.parallel.config import ParallelConfig
from megafusion.parallel.mesh import make_mesh
from megafusion.parallel.sharding import shard_spec_of
from megafusion.parallel.tensor import (
    VocabularyParallelCrossEntropy,
    shard_weights,
    vocab_range,
)
from tests.support.workers import run_workers

VOCABULARY, WIDTH = 90, 8


def values() -> tuple[torch.Tensor, ...]:
    """An embedding, a head, tokens and labels, the same on every rank; logits of hundreds."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(VOCABULARY, WIDTH, generator=generator)
    head = 100 * torch.randn(VOCABULARY, WIDTH, generator=generator)
    tokens = torch.arange(2 * VOCABULARY).reshape(2, -1) % VOCABULARY
    labels = tokens.flip(1).clone()
    labels[:, ::7] = -100
    return embedding, head, tokens, labels


def small_model() -> Transfusion:
    sizes = {"num_layers": 1, "hidden_size": WIDTH, "num_heads": 4, "vocab_size": VOCABULARY}
    return Transfusion(
        ModelConfig(**sizes, latent_channels=1, latent_downsampling=1, image_sizes=((2, 2),), patch_size=2),
        ObjectiveConfig(),
    )


def plain() -> tuple[torch.Tensor, ...]:
    """Vectors, the loss, and the gradient of the head."""
    embedding, head, tokens, labels = values()
    vectors, head = nn.functional.embedding(tokens, embedding), nn.Parameter(head)
    loss = cross_entropy(vectors @ head.T, labels)
    loss.backward()
    return vectors, loss.detach(), head.grad


def sharded(ulysses: int) -> tuple[torch.Tensor, torch.Tensor, range, torch.Tensor]:
    """This rank's vectors, the loss, its range of the vocabulary, and its gradient of the head."""
    mesh = make_mesh(ParallelConfig(tensor=2, ulysses=ulysses))
    model = small_model()
    shard_weights(model, mesh)
    embedding, head, tokens, labels = values()
    vocab_shard = vocab_range(VOCABULARY, mesh.rank("tensor"), 2)
    model.stem.embedding.weight.data = shard_spec_of(model.stem.embedding.weight).shard(embedding)
    model.tail.head.weight.data = shard_spec_of(model.tail.head.weight).shard(head)
    whole = nn.functional.embedding(tokens, embedding)
    loss = VocabularyParallelCrossEntropy(mesh.group("tensor"), vocab_shard)(model.tail.head(whole), labels)
    loss.backward()
    return model.stem.embedding(tokens).detach(), loss.detach(), vocab_shard, model.tail.head.weight.grad


@pytest.mark.parametrize("ulysses", [1, 2])
def test_an_uneven_vocabulary_gives_the_plain_loss_and_gradients(ulysses):
    vectors, loss, head_gradient = plain()
    ranks = run_workers(sharded, 2 * ulysses, ulysses)
    assert [len(shard) for _, _, shard, _ in ranks[:2]] == [64, 26]
    torch.testing.assert_close(sum(vectors for vectors, *_ in ranks), vectors)
    for _, found, shard, gradient in ranks:
        torch.testing.assert_close(found, loss)
        torch.testing.assert_close(gradient, head_gradient[shard.start : shard.stop], rtol=1e-4, atol=1e-4)
