"""Tensor parallelism (Megatron, arXiv 1909.08053): weights sharded over the ranks of a group.

In a tensor-parallel region each rank computes with its own heads, hidden units or vocabulary range.
Column-parallel layers begin a region and row-parallel layers end it. With Megatron's sequence parallelism
(arXiv 2205.05198) the residual stream and its norms, outside the regions, are sharded by positions.
"""

import warnings
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megafusion.model.modality import Modality, ModalityLinear
from megafusion.model.transformer import FusedLinear
from megafusion.model.weights import Replicated, declare, named_weights
from megafusion.objective.head import LanguageHead
from megafusion.parallel import collectives
from megafusion.parallel.degrees import vocab_shard_size
from megafusion.parallel.mesh import Mesh
from megafusion.parallel.sharding import ShardSpan, ShardSpec, set_shard_spec

POSITIONS = 1  # dimension S of x_BSD


class TensorParallelRegion:
    """The collectives at both ends of a region."""

    def __init__(self, mesh: Mesh):
        self.group, self.rank, self.num_ranks = mesh.group("tensor"), mesh.rank("tensor"), mesh.size("tensor")
        self.is_sequence_parallel = mesh.config.sequence

    def shard(self, x_BS: Tensor) -> Tensor:
        """The positions that this rank's residual stream has, of a tensor that every rank holds whole."""
        return x_BS.chunk(self.num_ranks, POSITIONS)[self.rank] if self.is_sequence_parallel else x_BS

    def gather_or_copy(self, x_BSD: Tensor) -> Tensor:
        """The whole residual stream for each rank's work, whose gradients are summed."""
        if self.is_sequence_parallel:
            return collectives.all_gather(x_BSD, self.group, POSITIONS)
        return collectives.copy(x_BSD, self.group)

    def reduce_or_scatter(self, x_BSD: Tensor) -> Tensor:
        """The sum of the ranks' results; with sequence parallelism this rank's positions of it."""
        if self.is_sequence_parallel:
            return collectives.reduce_scatter(x_BSD, self.group, POSITIONS)
        return collectives.all_reduce(x_BSD, self.group)


class ColumnParallelLinear(FusedLinear):
    """This rank's slice of each fused layer's outputs, from the whole residual stream."""

    def __init__(self, linear: FusedLinear, region: TensorParallelRegion):
        sizes = tuple(size // region.num_ranks for size in linear.sizes)
        for_patches, has_bias = linear.image_weight is not None, linear.bias is not None
        options = {"bias": has_bias, "for_patches": for_patches, "gives_sorted": linear.gives_sorted}
        super().__init__(linear.in_features, sizes, **options)
        self.to(linear.weight.device)
        self.region: TensorParallelRegion = region
        spans, local, whole = [], 0, 0
        for size in sizes:
            spans.append(ShardSpan(local, whole + region.rank * size, size))
            local, whole = local + size, whole + region.num_ranks * size
        for name, parameter in linear.named_parameters():
            set_shard_spec(getattr(self, name), ShardSpec(parameter.shape, 0, tuple(spans)))

    def forward(self, x_BSD: Tensor, *modality: Modality) -> Tensor:
        return super().forward(self.region.gather_or_copy(x_BSD), *modality)


class RowParallelLinear(ModalityLinear):
    """This rank's slice of the inputs; the region's reduction sums the partial outputs."""

    def __init__(self, linear: nn.Linear, region: TensorParallelRegion):
        assert "bias" not in dict(linear.named_parameters()), "a bias would be added once by every rank"
        size = linear.in_features // region.num_ranks
        for_patches = getattr(linear, "image_weight", None) is not None
        super().__init__(size, linear.out_features, for_patches=for_patches)
        self.to(linear.weight.device)
        self.region: TensorParallelRegion = region
        span = ShardSpan(0, region.rank * size, size)
        for name, parameter in linear.named_parameters():
            set_shard_spec(getattr(self, name), ShardSpec(parameter.shape, 1, (span,)))

    def forward(self, x: Tensor, *modality: Modality) -> Tensor:
        return self.region.reduce_or_scatter(super().forward(x, *modality))


class VocabularyParallelEmbedding(nn.Embedding):
    """This rank's range of the vocabulary; tokens outside embed to zero, so the sum over ranks is whole.

    Ulysses ranks hold the same shard. Each embeds only a part of it, so that their sum has each token once.
    """

    def __init__(self, embedding: nn.Embedding, vocab_shard: range, mesh: Mesh):
        super().__init__(len(vocab_shard), embedding.embedding_dim, device=embedding.weight.device)
        rank, num_ranks = mesh.rank("ulysses"), mesh.size("ulysses")
        start, stop = (len(vocab_shard) * i // num_ranks for i in (rank, rank + 1))
        self.vocab_shard, self.embedded_range = vocab_shard, vocab_shard[start:stop]
        set_shard_spec(self.weight, _vocab_spec(embedding.weight, vocab_shard))

    def forward(self, tokens_BS: Tensor) -> Tensor:
        is_local = (tokens_BS >= self.embedded_range.start) & (tokens_BS < self.embedded_range.stop)
        vectors = super().forward(torch.where(is_local, tokens_BS - self.vocab_shard.start, 0))
        return torch.where(is_local[..., None], vectors, 0)


class VocabularyParallelHead(LanguageHead):
    """A head that gives the logits of this rank's range of the vocabulary, which no rank ever gathers.

    For the cross-entropy the ranks exchange three numbers a position; see `Merge`.
    """

    def __init__(self, head: nn.Linear, vocab_shard: range, group: dist.ProcessGroup):
        super().__init__(head.in_features, len(vocab_shard), head.weight.device)
        self.first_token, self.group = vocab_shard.start, group
        self.most_columns = vocab_shard_size(head.out_features, dist.get_world_size(group))
        set_shard_spec(self.weight, _vocab_spec(head.weight, vocab_shard))

    def merge(self, statistics_3R: Tensor) -> Tensor:
        all_ranks = collectives.all_gather(statistics_3R[None], self.group, 0)
        largest_TR, totals_TR, targets_TR = all_ranks.unbind(1)
        largest = largest_TR.amax(0)
        return torch.stack([largest, (totals_TR + largest_TR - largest).logsumexp(0), targets_TR.sum(0)])


def vocab_range(vocab_size: int, rank: int, num_ranks: int) -> range:
    """The vocabulary of one tensor rank; the last one's may be smaller."""
    size = vocab_shard_size(vocab_size, num_ranks)
    return range(rank * size, min((rank + 1) * size, vocab_size))


def shard_weights(model: nn.Module, mesh: Mesh) -> None:
    """Replace each module that declares a sharded weight by one with this rank's shard."""
    region = TensorParallelRegion(mesh)
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if spec := getattr(module, "weight_spec", None):
                sharded = _sharded(module, region, mesh)
                setattr(parent, name, declare(sharded, spec.sharding, spec.init))


def _sharded(module: nn.Module, region: TensorParallelRegion, mesh: Mesh) -> nn.Module:
    match module.weight_spec.sharding:
        case "vocab" if isinstance(module, nn.Embedding):
            vocab_shard = vocab_range(module.num_embeddings, region.rank, region.num_ranks)
            return VocabularyParallelEmbedding(module, vocab_shard, mesh)
        case _ if region.num_ranks == 1:
            return module
        case "column":
            return ColumnParallelLinear(module, region)
        case "row":
            return RowParallelLinear(module, region)
        case "vocab":
            vocab_shard = vocab_range(module.out_features, region.rank, region.num_ranks)
            return VocabularyParallelHead(module, vocab_shard, region.group)
        case Replicated():
            return module


def overlap_collectives(group: dist.ProcessGroup) -> None:
    """Let torch.compile divide the group's collectives into parts that run beside parts of the products.

    An all-gather before a product, and a reduce-scatter after one, become one operator each, over symmetric
    memory (Wang et al., "Overlap Communication with Dependent Computation via Decomposition", ASPLOS 2023).
    """
    import torch._inductor.config as inductor
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    inductor._micro_pipeline_tp = True  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        # torch 2.13 calls it needless, but the compiler's pass leaves other groups alone.
        warnings.simplefilter("ignore", FutureWarning)
        enable_symm_mem_for_group(group.group_name)


def _vocab_spec(whole: Tensor, vocab_shard: range) -> ShardSpec:
    return ShardSpec(whole.shape, 0, (ShardSpan(0, vocab_shard.start, len(vocab_shard)),))


def sum_partial_gradients(model: nn.Module, mesh: Mesh) -> None:
    """All-reduce over the tensor group the gradients of replicated weights that are partial on each rank."""
    declared = {Replicated("heads"), Replicated("images")}
    if mesh.config.sequence:
        declared.add(Replicated("positions"))
    for weight in named_weights(model):
        parameter = getattr(weight.owner, weight.key)
        if weight.sharding in declared and parameter.requires_grad:
            parameter.register_hook(partial(collectives.all_reduce, group=mesh.group("tensor")))
