"""What a plan is made of: a run's sections, a layout of its ranks, and what is planned from them."""

from dataclasses import dataclass
from functools import cached_property

from megafusion.engine.config import TrainConfig
from megafusion.model.config import ModelConfig
from megafusion.parallel.config import ParallelConfig
from megafusion.parallel.degrees import data_degree, vocab_shard_size
from megafusion.parallel.partition import stage_blocks
from megafusion.plan.adapters import Adapter, adapter_layers, num_flops, num_weights
from megafusion.plan.rows import RowKind, RowStatistics, row_statistics


@dataclass(frozen=True)
class Job:
    """A run on a number of ranks, with the sections of its configuration that decide its size."""

    model: ModelConfig
    train: TrainConfig
    parallel: ParallelConfig
    sequence_length: int
    images_per_row: int
    world_size: int
    rows: RowKind = "mixed"

    @property
    def data(self) -> int:
        return data_degree(self.parallel, self.world_size)

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights, over which ZeRO shards."""
        return self.data * self.parallel.ulysses

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a data rank's step."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.data)

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch_size * self.sequence_length

    @property
    def tokens(self) -> float:
        """Positions of a micro-batch on this rank, outside attention and tensor-parallel regions."""
        return self.train.micro_batch_size * self.sequence_length / self.parallel.ulysses

    @property
    def bytes_per_number(self) -> int:
        """Of weights and activations."""
        return 4 if self.train.precision == "fp32" else 2

    @cached_property
    def adapter(self) -> Adapter:
        return adapter_layers(self.model)

    @cached_property
    def statistics(self) -> RowStatistics:
        return row_statistics(self.rows, self.sequence_length, max(self.model.patches), self.images_per_row)

    @property
    def local_slots(self) -> int:
        """Image slots that this rank's adapters compute of a micro-batch."""
        slots = self.train.micro_batch_size * self.images_per_row
        return -(-slots // (self.parallel.tensor * self.parallel.ulysses))

    @cached_property
    def stages(self) -> list[range]:
        """Blocks of each pipeline stage, as parallelize assigns them: by dense FLOPs of a row."""
        model, length = self.model, self.sequence_length
        block = 2 * length * matrix_weights(model) + 4 * length**2 * model.num_heads * model.head_size
        stem = self.images_per_row * num_flops(self.adapter.down)
        tail = self.images_per_row * num_flops(self.adapter.up)
        tail += 2 * length * model.vocab_size * model.hidden_size
        return stage_blocks([stem, *[block] * model.num_layers, tail], self.parallel.pipeline)

    def tensors(self, stage: int) -> dict[str, list[int]]:
        """Numbers in each tensor of a stage's parameters on a tensor rank, the first, by part."""
        model, ranks = self.model, self.parallel.tensor
        kv, queries, size = (
            model.kv_heads * model.head_size,
            model.num_heads * model.head_size,
            model.hidden_size,
        )
        block = [size * (queries + 2 * kv) // ranks, queries * size // ranks]
        block += [size * 2 * model.ffn_size // ranks, model.ffn_size * size // ranks, size, size]
        block += [(queries + 2 * kv) // ranks] if model.attention_bias else []
        block += [model.head_size] * 2 if model.qk_norm else []
        vocabulary = vocab_shard_size(model.vocab_size, ranks) * size
        first, last = stage == 0, stage == len(self.stages) - 1
        is_tied = model.tie_embeddings and first
        return {
            "blocks": block * len(self.stages[stage]),
            "embedding": [vocabulary] if first else [],
            "head": [*([] if is_tied else [vocabulary]), size] if last else [],
            "adapter": [
                number
                for layers in (self.adapter.down * first, self.adapter.up * last)
                for layer in layers
                for number in layer.tensors
            ],
        }

    def num_weights(self, stage: int) -> int:
        """Parameters of a stage on a tensor rank."""
        return sum(map(sum, self.tensors(stage).values()))


def matrix_weights(model: ModelConfig) -> int:
    """Weights in the matrices of a block."""
    queries, kv = model.num_heads * model.head_size, model.kv_heads * model.head_size
    return model.hidden_size * (2 * queries + 2 * kv + 3 * model.ffn_size)


def whole_weights(model: ModelConfig) -> dict[str, int]:
    """Parameters of the whole model by part."""
    size, adapter = model.hidden_size, adapter_layers(model)
    vectors = 2 * size + (2 * model.head_size if model.qk_norm else 0)
    if model.attention_bias:
        vectors += (model.num_heads + 2 * model.kv_heads) * model.head_size
    return {
        "blocks": model.num_layers * (matrix_weights(model) + vectors),
        "embedding": model.vocab_size * size,
        "head": size + (0 if model.tie_embeddings else model.vocab_size * size),
        "adapter": num_weights(adapter.down) + num_weights(adapter.up),
    }


def token_flops(job: Job) -> dict[str, float]:
    """FLOPs of a position's forward and backward pass by part, without recomputation and masked pairs."""
    model = job.model
    images = job.statistics.images / job.sequence_length
    return {
        "blocks": 6.0 * model.num_layers * matrix_weights(model),
        "attention": 12.0
        * model.num_layers
        * model.num_heads
        * model.head_size
        * job.statistics.visible_keys,
        "head": 6.0 * model.vocab_size * model.hidden_size,
        "adapter": 3.0 * images * (num_flops(job.adapter.down) + num_flops(job.adapter.up)),
    }
