"""The input of a plan: a run's sections and a layout of its ranks, and the counts that follow from them."""

from dataclasses import dataclass
from functools import cached_property

from megafusion.engine.config import TrainConfig
from megafusion.model.config import LoraConfig, ModelConfig
from megafusion.parallel.config import ParallelConfig
from megafusion.parallel.degrees import data_degree, vocab_shard_size
from megafusion.parallel.partition import virtual_stage_blocks
from megafusion.plan.adapters import Adapter, Layer, adapter_layers, num_flops, num_weights
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
    clean_context: bool = False
    has_alignment: bool = False

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
        model, shape = self.model, (self.sequence_length, max(self.model.patches), self.images_per_row)
        is_causal = model.image_attention == "causal"
        return row_statistics(self.rows, *shape, model.codebook_size > 0, is_causal, self.clean_context)

    @property
    def down_passes(self) -> int:
        """Passes of an image through the stem's adapter: with clean context, noised and clean."""
        return 2 if self.clean_context else 1

    @property
    def local_slots(self) -> int:
        """Image slots that this rank's adapters compute of a micro-batch."""
        slots = self.train.micro_batch_size * self.images_per_row
        return -(-slots // (self.parallel.tensor * self.parallel.ulysses))

    @cached_property
    def virtual_stages(self) -> list[list[range]]:
        """Blocks of each stage's virtual stages, as parallelize assigns them: by dense FLOPs of a row."""
        model, length = self.model, self.sequence_length
        block = 2 * length * matrix_weights(model) + 4 * length**2 * model.num_heads * model.head_size
        stem = self.images_per_row * self.down_passes * num_flops(self.adapter.down)
        tail = self.images_per_row * num_flops(self.adapter.up)
        tail += 2 * length * model.vocab_size * model.hidden_size
        flops = [stem, *[block] * model.num_layers, tail]
        return virtual_stage_blocks(flops, self.parallel.pipeline, self.parallel.virtual_stages)

    @cached_property
    def stages(self) -> list[list[int]]:
        """Blocks of each pipeline stage."""
        return [[number for blocks in stage for number in blocks] for stage in self.virtual_stages]

    def tensors(self, stage: int) -> dict[str, int]:
        """Numbers in each of a stage's parameters, by name, on the first tensor rank.

        The adapters' tensors are numbered in place of their modules' names.
        """
        model, size = self.model, self.model.hidden_size
        is_first, is_last = stage == 0, stage == len(self.stages) - 1
        found: dict[str, int] = {}
        for number in self.stages[stage]:
            found |= {f"blocks.{number}.{name}": numbers for name, numbers in self._block.items()}
            if self.train.lora:
                found |= self._lora(self.train.lora, f"blocks.{number}")
        vocabulary = vocab_shard_size(model.vocab_size, self.parallel.tensor) * size
        if is_first:
            found |= {"stem.embedding.weight": vocabulary} | _numbered("stem.adapter", self.adapter.down)
        if is_last:
            found |= {"tail.norm.weight": size} | _numbered("tail.adapter", self.adapter.up)
            if not (model.tie_embeddings and is_first):
                found["tail.head.weight"] = vocabulary
        return found

    @cached_property
    def _block(self) -> dict[str, int]:
        """Tensors of one block."""
        return _block_tensors(self.model, self.parallel.tensor)

    def _lora(self, lora: LoraConfig, block: str) -> dict[str, int]:
        """Tensors of a block's updates: A is sharded by inputs, or each B by outputs."""
        ranks = self.parallel.tensor
        found: dict[str, int] = {}
        for layer, (inputs, parts, is_column) in _layers(self.model).items():
            if lora.adapts(name := f"{block}.{layer}"):
                a, b = (1, ranks) if is_column else (ranks, 1)
                found[f"{name}.lora_a.weight"] = lora.rank * len(parts) * inputs // a
                for number, part in enumerate(parts):
                    found[f"{name}.lora_b.{number}.weight"] = lora.rank * part // b
        return found

    def num_weights(self, stage: int) -> int:
        """Parameters of a stage on a tensor rank."""
        return self._counts[stage][0]

    def num_trained(self, stage: int) -> int:
        """Those that are trained, not frozen."""
        return self._counts[stage][1]

    @cached_property
    def _counts(self) -> list[tuple[int, int]]:
        """All and trained parameters of each stage."""
        everything = not (self.train.lora or self.train.freeze)
        counts = []
        for stage in range(len(self.stages)):
            tensors = self.tensors(stage)
            total = sum(tensors.values())
            trained = (numbers for name, numbers in tensors.items() if self.train.trains(name))
            counts.append((total, total if everything else sum(trained)))
        return counts

    @property
    def trains_matrices(self) -> bool:
        """Whether the blocks' matrices have gradients of their own."""
        return any(
            self.train.trains(f"blocks.0.{name}")
            for name in ("attention.qkv.weight", "feed_forward.down.weight")
        )


def _layers(model: ModelConfig) -> dict[str, tuple[int, tuple[int, ...], bool]]:
    """A block's linear layers: inputs, outputs of each fused part, and whether it is column-parallel."""
    size, hidden = model.hidden_size, model.ffn_size
    queries, kv = model.num_heads * model.head_size, model.kv_heads * model.head_size
    return {
        "attention.qkv": (size, (queries, kv, kv), True),
        "attention.out": (queries, (size,), False),
        "feed_forward.gate_up": (size, (hidden, hidden), True),
        "feed_forward.down": (hidden, (size,), False),
    }


def _block_tensors(model: ModelConfig, ranks: int = 1) -> dict[str, int]:
    """Numbers in each tensor of a block on a tensor rank."""
    found = {f"{name}_norm.weight": model.hidden_size for name in ("attention", "feed_forward")}
    for name, (inputs, parts, _) in _layers(model).items():
        found[f"{name}.weight"] = inputs * sum(parts) // ranks
    if model.attention_bias:
        found["attention.qkv.bias"] = sum(_layers(model)["attention.qkv"][1]) // ranks
    if model.qk_norm:
        found |= {f"attention.{name}_norm.weight": model.head_size for name in "qk"}
    apart = {"none": (), "feed_forward": ("feed_forward",), "all": ("attention", "feed_forward")}
    for name in [name for name in found if name.startswith(apart[model.modality_weights])]:
        module, _, key = name.rpartition(".")
        found[f"{module}.image_{key}"] = found[name]
    return found


def _numbered(prefix: str, layers: tuple[Layer, ...]) -> dict[str, int]:
    return {
        f"{prefix}.{number}.{index}": numbers
        for number, layer in enumerate(layers)
        for index, numbers in enumerate(layer.tensors)
    }


def matrix_weights(model: ModelConfig) -> int:
    """Weights in the matrices of a block that a position is multiplied by."""
    queries, kv = model.num_heads * model.head_size, model.kv_heads * model.head_size
    return model.hidden_size * (2 * queries + 2 * kv + 3 * model.ffn_size)


def whole_weights(model: ModelConfig) -> dict[str, int]:
    """Parameters of the whole model by part."""
    size, adapter = model.hidden_size, adapter_layers(model)
    return {
        "blocks": model.num_layers * sum(_block_tensors(model).values()),
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
        "head": 6.0 * model.vocab_size * model.hidden_size * job.statistics.targets,
        "adapter": 3.0 * images * (job.down_passes * num_flops(job.adapter.down) + num_flops(job.adapter.up)),
    }
