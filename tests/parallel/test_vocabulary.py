"""A vocabulary that does not divide evenly: shards of a multiple of 64 tokens, the last one smaller."""

from unittest import mock

import pytest
import torch
from torch import nn

from megafusion.model.config import ModelConfig
from megafusion.model.transfusion import Transfusion
from megafusion.objective.config import ObjectiveConfig
from megafusion.parallel.config import ParallelConfig
from megafusion.parallel.mesh import make_mesh
from megafusion.parallel.sharding import shard_spec_of
from megafusion.parallel.tensor import shard_weights, vocab_range
from megafusion.parallel.ulysses import SequenceParallelObjective
from megafusion.sequence.packing import Targets, target_index
from tests.support.workers import run_workers

VOCABULARY, WIDTH = 270, 8


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
    """Vectors, the loss, and the gradients of the hidden states and of the head."""
    embedding, head, tokens, labels = values()
    vectors = nn.functional.embedding(tokens, embedding).requires_grad_()
    head = nn.Parameter(head)
    loss = nn.functional.cross_entropy((vectors @ head.T).mT, labels, reduction="sum")
    loss.backward()
    return vectors.detach(), loss.detach(), vectors.grad, head.grad


def sharded(ulysses: int) -> tuple[torch.Tensor, torch.Tensor, range, torch.Tensor, torch.Tensor]:
    """This rank's vectors, the loss, its range of the vocabulary, and its parts of the gradients of hidden
    states and head."""
    mesh = make_mesh(ParallelConfig(tensor=2, ulysses=ulysses))
    model = small_model()
    shard_weights(model, mesh)
    embedding, head, tokens, labels = values()
    vocab_shard = vocab_range(VOCABULARY, mesh.rank("tensor"), 2)
    model.stem.embedding.weight.data = shard_spec_of(model.stem.embedding.weight).shard(embedding)
    model.tail.head.weight.data = shard_spec_of(model.tail.head.weight).shard(head)
    whole = nn.functional.embedding(tokens, embedding).requires_grad_()
    objective = SequenceParallelObjective(ObjectiveConfig(), ((2, 2),), mesh.group("ulysses"))
    targets = Targets(labels, *[None] * 7, target_index(labels))
    with mock.patch("megafusion.objective.config.LOGITS_BYTES", 256 * 128 * 4):  # more than one chunk
        loss = objective.nats(model.tail.head, whole, targets)
    loss.backward()
    vectors = model.stem.embedding(tokens).detach()
    return vectors, loss.detach(), vocab_shard, whole.grad, model.tail.head.weight.grad


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """By norm: with logits of hundreds, single gradients differ more between two orders of a product."""
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("ulysses", [1, 2])
def test_an_uneven_vocabulary_gives_the_plain_loss_and_gradients(ulysses):
    vectors, loss, hidden_gradient, head_gradient = plain()
    ranks = run_workers(sharded, 2 * ulysses, ulysses)
    assert [len(rank[2]) for rank in ranks[:2]] == [192, 78]  # padded to 256 and 128 columns
    torch.testing.assert_close(sum(vectors for vectors, *_ in ranks), vectors)
    assert relative_error(sum(rank[3] for rank in ranks), hidden_gradient) < 1e-5
    for tensor_rank, shard in enumerate((range(192), range(192, VOCABULARY))):
        # Ulysses ranks hold the same shard, and each adds the gradient of its targets.
        gradient = sum(rank[4] for rank in ranks[tensor_rank::2])
        assert relative_error(gradient, head_gradient[shard.start : shard.stop]) < 1e-5
    for _, found, *_ in ranks:
        torch.testing.assert_close(found, loss)
