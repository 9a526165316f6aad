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
from megafusion.parallel.layout import Layout, Run, set_layout
from megafusion.parallel.topology import Topology, vocabulary_share
from megafusion.sequence.document import IGNORED_LABEL

POSITIONS = 1  # dimension S of x_BSD


class Passage:
    """The two crossings between the residual stream and the ranks of a tensor group."""

    def __init__(self, topology: Topology):
        self.group = topology.group("tensor")
        self.is_sliced = topology.config.sequence

    def enter(self, x_BSD: Tensor) -> Tensor:
        """The whole stream for each rank's part of the work; gradients of the parts are summed."""
        if self.is_sliced:
            return collectives.gather(x_BSD, self.group, POSITIONS)
        return collectives.copy(x_BSD, self.group)

    def leave(self, x_BSD: Tensor) -> Tensor:
        """The sum of what the ranks made; under sequence parallelism this rank's positions of it."""
        if self.is_sliced:
            return collectives.scatter(x_BSD, self.group, POSITIONS)
        return collectives.reduce(x_BSD, self.group)


class EnteringNorm(nn.RMSNorm):
    """A norm behind which the ranks' parts of the work begin."""

    def __init__(self, norm: nn.RMSNorm, passage: Passage):
        super().__init__(norm.normalized_shape, eps=norm.eps, device=norm.weight.device)
        self.passage = passage

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.passage.enter(super().forward(x_BSD))


class RowParallelLinear(nn.Linear):
    """The input's features are divided; the ranks' outputs are summed."""

    def __init__(self, linear: nn.Linear, passage: Passage, rank: int, num_ranks: int):
        size = linear.in_features // num_ranks
        super().__init__(size, linear.out_features, bias=False, device=linear.weight.device)
        self.passage = passage
        set_layout(self.weight, Layout(linear.weight.shape, 1, (Run(0, rank * size, size),)))

    def forward(self, x: Tensor) -> Tensor:
        return self.passage.leave(super().forward(x))


def column_parallel(linear: FusedLinear, rank: int, num_ranks: int) -> FusedLinear:
    """This rank's outputs of each of the fused layers."""
    sizes = tuple(size // num_ranks for size in linear.sizes)
    part = FusedLinear(linear.in_features, sizes).to(linear.weight.device)
    runs, local, whole = [], 0, 0
    for size in sizes:
        runs.append(Run(local, whole + rank * size, size))
        local, whole = local + size, whole + num_ranks * size
    set_layout(part.weight, Layout(linear.weight.shape, 0, tuple(runs)))
    return part


class VocabularyParallelEmbedding(nn.Embedding):
    """Vectors of this rank's share of the words, zeros for the others: to be summed over the ranks of a row.

    Ulysses ranks hold the same share and look up a part of it each, so that their sum counts a word once.
    """

    def __init__(self, embedding: nn.Embedding, words: range, looked_up: range):
        super().__init__(len(words), embedding.embedding_dim, device=embedding.weight.device)
        self.words, self.looked_up = words, looked_up
        set_layout(self.weight, _words_layout(embedding.weight, words))

    def forward(self, tokens_BS: Tensor) -> Tensor:
        is_here = (tokens_BS >= self.looked_up.start) & (tokens_BS < self.looked_up.stop)
        vectors = super().forward(torch.where(is_here, tokens_BS - self.words.start, 0))
        return torch.where(is_here[..., None], vectors, 0)


class VocabularyParallelCrossEntropy:
    """Cross-entropy of logits that are divided by words: no rank ever holds a whole row of them.

    Each rank contributes the largest logit, the sum of exponentials and the target's logit of its share.
    """

    def __init__(self, group: dist.ProcessGroup, words: range):
        self.group, self.words = group, words

    def __call__(self, logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
        """Nats summed over the labels that count; logits [B, S, words of this rank]."""
        logits = logits_BSV.float()
        largest = logits.detach().amax(-1)
        dist.all_reduce(largest, dist.ReduceOp.MAX, self.group)
        logits = logits - largest[..., None]
        is_here = (labels_BS >= self.words.start) & (labels_BS < self.words.stop)
        index = torch.where(is_here, labels_BS - self.words.start, 0)
        target = torch.where(is_here, logits.gather(-1, index[..., None])[..., 0], 0)
        sums = collectives.reduce(torch.stack([logits.exp().sum(-1), target]), self.group)
        nats = sums[0].log() - sums[1]
        return torch.where(labels_BS != IGNORED_LABEL, nats, 0).sum()


def words_of_rank(vocab_size: int, rank: int, num_ranks: int) -> range:
    """The share of the vocabulary of one tensor rank; the last one's may be smaller."""
    share = vocabulary_share(vocab_size, num_ranks)
    return range(rank * share, min((rank + 1) * share, vocab_size))


def divide_block(block: Block, topology: Topology) -> None:
    """Put this rank's part in the place of a block's matrices."""
    rank, num_ranks, passage = topology.place("tensor"), topology.size("tensor"), Passage(topology)
    attention, feed_forward = block.attention, block.feed_forward
    block.attention_norm = EnteringNorm(block.attention_norm, passage)
    attention.qkv = column_parallel(attention.qkv, rank, num_ranks)
    attention.out = RowParallelLinear(attention.out, passage, rank, num_ranks)
    block.feed_forward_norm = EnteringNorm(block.feed_forward_norm, passage)
    feed_forward.gate_up = column_parallel(feed_forward.gate_up, rank, num_ranks)
    feed_forward.down = RowParallelLinear(feed_forward.down, passage, rank, num_ranks)


def divide_stem(stem: Stem, topology: Topology) -> None:
    """Put this rank's words in the place of the embedding."""
    words = words_of_rank(stem.embedding.num_embeddings, topology.place("tensor"), topology.size("tensor"))
    bounds = [
        words.start + len(words) * i // topology.size("ulysses") for i in range(topology.size("ulysses") + 1)
    ]
    looked_up = range(bounds[topology.place("ulysses")], bounds[topology.place("ulysses") + 1])
    stem.embedding = VocabularyParallelEmbedding(stem.embedding, words, looked_up)


def divide_tail(tail: Tail, topology: Topology) -> None:
    """Put this rank's words in the place of the head."""
    words = words_of_rank(tail.head.out_features, topology.place("tensor"), topology.size("tensor"))
    whole = tail.head.weight
    tail.head = nn.Linear(tail.head.in_features, len(words), bias=False, device=whole.device)
    set_layout(tail.head.weight, _words_layout(whole, words))


def _words_layout(whole: Tensor, words: range) -> Layout:
    return Layout(whole.shape, 0, (Run(0, words.start, len(words)),))
