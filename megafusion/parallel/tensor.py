"""Tensor parallelism (Megatron, arXiv 1909.08053): every matrix divided over the ranks of a group.

Between two of `Passage`'s crossings, each rank works with its own heads, hidden units or words: `enter`
hands the residual stream to all of them, `leave` adds up what they made of it. With Megatron's sequence
parallelism (arXiv 2205.05198) the stream itself, and the norms on it, are divided by positions.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megafusion.model.transformer import Block, FusedLinear
from megafusion.model.transfusion import Stem, Tail
from megafusion.parallel import collectives
from megafusion.parallel.mesh import Mesh, vocab_shard_size
from megafusion.parallel.sharding import ShardSpan, ShardSpec, set_shard_spec
from megafusion.sequence.document import IGNORED_LABEL

POSITIONS = 1  # dimension S of x_BSD


class TensorParallelRegion:
    """The two crossings between the residual stream and the ranks of a tensor group."""

    def __init__(self, mesh: Mesh):
        self.group = mesh.group("tensor")
        self.is_sliced = mesh.config.sequence

    def gather_or_copy(self, x_BSD: Tensor) -> Tensor:
        """The whole stream for each rank's part of the work; gradients of the parts are summed."""
        if self.is_sliced:
            return collectives.gather(x_BSD, self.group, POSITIONS)
        return collectives.copy(x_BSD, self.group)

    def reduce_or_scatter(self, x_BSD: Tensor) -> Tensor:
        """The sum of what the ranks made; under sequence parallelism this rank's positions of it."""
        if self.is_sliced:
            return collectives.scatter(x_BSD, self.group, POSITIONS)
        return collectives.reduce(x_BSD, self.group)


class NormIntoRegion(nn.RMSNorm):
    """A norm behind which the ranks' parts of the work begin."""

    def __init__(self, norm: nn.RMSNorm, region: TensorParallelRegion):
        super().__init__(norm.normalized_shape, eps=norm.eps, device=norm.weight.device)
        self.region = region

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.region.gather_or_copy(super().forward(x_BSD))


class RowParallelLinear(nn.Linear):
    """The input's features are divided; the ranks' outputs are summed."""

    def __init__(self, linear: nn.Linear, region: TensorParallelRegion, rank: int, num_ranks: int):
        size = linear.in_features // num_ranks
        super().__init__(size, linear.out_features, bias=False, device=linear.weight.device)
        self.region = region
        set_shard_spec(self.weight, ShardSpec(linear.weight.shape, 1, (ShardSpan(0, rank * size, size),)))

    def forward(self, x: Tensor) -> Tensor:
        return self.region.reduce_or_scatter(super().forward(x))


def column_parallel(linear: FusedLinear, rank: int, num_ranks: int) -> FusedLinear:
    """This rank's outputs of each of the fused layers."""
    sizes = tuple(size // num_ranks for size in linear.sizes)
    part = FusedLinear(linear.in_features, sizes).to(linear.weight.device)
    runs, local, whole = [], 0, 0
    for size in sizes:
        runs.append(ShardSpan(local, whole + rank * size, size))
        local, whole = local + size, whole + num_ranks * size
    set_shard_spec(part.weight, ShardSpec(linear.weight.shape, 0, tuple(runs)))
    return part


class VocabularyParallelEmbedding(nn.Embedding):
    """Vectors of this rank's share of the words, zeros for the others: to be summed over the ranks of a row.

    Ulysses ranks hold the same share and look up a part of it each, so that their sum counts a word once.
    """

    def __init__(self, embedding: nn.Embedding, vocab_shard: range, embedded_range: range):
        super().__init__(len(vocab_shard), embedding.embedding_dim, device=embedding.weight.device)
        self.vocab_shard, self.embedded_range = vocab_shard, embedded_range
        set_shard_spec(self.weight, _vocab_spec(embedding.weight, vocab_shard))

    def forward(self, tokens_BS: Tensor) -> Tensor:
        is_here = (tokens_BS >= self.embedded_range.start) & (tokens_BS < self.embedded_range.stop)
        vectors = super().forward(torch.where(is_here, tokens_BS - self.vocab_shard.start, 0))
        return torch.where(is_here[..., None], vectors, 0)


class VocabularyParallelCrossEntropy:
    """Cross-entropy of logits that are divided by words: no rank ever holds a whole row of them.

    Each rank contributes the largest logit, the sum of exponentials and the target's logit of its share.
    """

    def __init__(self, group: dist.ProcessGroup, vocab_shard: range):
        self.group, self.vocab_shard = group, vocab_shard

    def __call__(self, logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
        """Nats summed over the labels that count; logits [B, S, words of this rank]."""
        logits = logits_BSV.float()
        largest = logits.detach().amax(-1)
        dist.all_reduce(largest, dist.ReduceOp.MAX, self.group)
        logits = logits - largest[..., None]
        is_here = (labels_BS >= self.vocab_shard.start) & (labels_BS < self.vocab_shard.stop)
        index = torch.where(is_here, labels_BS - self.vocab_shard.start, 0)
        target = torch.where(is_here, logits.gather(-1, index[..., None])[..., 0], 0)
        sums = collectives.reduce(torch.stack([logits.exp().sum(-1), target]), self.group)
        nats = sums[0].log() - sums[1]
        return torch.where(labels_BS != IGNORED_LABEL, nats, 0).sum()


def vocab_range(vocab_size: int, rank: int, num_ranks: int) -> range:
    """The share of the vocabulary of one tensor rank; the last one's may be smaller."""
    share = vocab_shard_size(vocab_size, num_ranks)
    return range(rank * share, min((rank + 1) * share, vocab_size))


def shard_block(block: Block, mesh: Mesh) -> None:
    """Put this rank's part in the place of a block's matrices."""
    rank, num_ranks, region = mesh.rank("tensor"), mesh.size("tensor"), TensorParallelRegion(mesh)
    attention, feed_forward = block.attention, block.feed_forward
    block.attention_norm = NormIntoRegion(block.attention_norm, region)
    attention.qkv = column_parallel(attention.qkv, rank, num_ranks)
    attention.out = RowParallelLinear(attention.out, region, rank, num_ranks)
    block.feed_forward_norm = NormIntoRegion(block.feed_forward_norm, region)
    feed_forward.gate_up = column_parallel(feed_forward.gate_up, rank, num_ranks)
    feed_forward.down = RowParallelLinear(feed_forward.down, region, rank, num_ranks)


def shard_stem(stem: Stem, mesh: Mesh) -> None:
    """Put this rank's words in the place of the embedding."""
    vocab_shard = vocab_range(stem.embedding.num_embeddings, mesh.rank("tensor"), mesh.size("tensor"))
    bounds = [
        vocab_shard.start + len(vocab_shard) * i // mesh.size("ulysses")
        for i in range(mesh.size("ulysses") + 1)
    ]
    embedded_range = range(bounds[mesh.rank("ulysses")], bounds[mesh.rank("ulysses") + 1])
    stem.embedding = VocabularyParallelEmbedding(stem.embedding, vocab_shard, embedded_range)


def shard_tail(tail: Tail, mesh: Mesh) -> None:
    """Put this rank's words in the place of the head."""
    vocab_shard = vocab_range(tail.head.out_features, mesh.rank("tensor"), mesh.size("tensor"))
    whole = tail.head.weight
    tail.head = nn.Linear(tail.head.in_features, len(vocab_shard), bias=False, device=whole.device)
    set_shard_spec(tail.head.weight, _vocab_spec(whole, vocab_shard))


def _vocab_spec(whole: Tensor, vocab_shard: range) -> ShardSpec:
    return ShardSpec(whole.shape, 0, (ShardSpan(0, vocab_shard.start, len(vocab_shard)),))
