"""Published speeds and memory of other trainers, and what the plan says of the same runs.

    python -m tests.plan.peers

prints the table of docs/scaling.md. Dense models are configurations of text alone. One number a project, the
rate of its matrix products, is set by one row (`calibrates`), which does not count. The traits of its code
are from its documentation.
"""

from dataclasses import dataclass, replace
from functools import cache

from megafusion.engine.config import TrainConfig
from megafusion.model.config import ModelConfig
from megafusion.parallel.config import ParallelConfig
from megafusion.plan.chip import Chip, load_chip
from megafusion.plan.job import Job
from megafusion.plan.search import Plan, plan_job
from megafusion.plan.software import Software


@dataclass(frozen=True)
class Dense:
    """A dense model: blocks, hidden size, heads, key-value heads, feed-forward, vocabulary."""

    layers: int
    size: int
    heads: int
    kv: int
    ffn: int
    vocab: int
    tied: bool = False

    def config(self) -> ModelConfig:
        return ModelConfig(
            num_layers=self.layers, hidden_size=self.size, num_heads=self.heads, num_kv_heads=self.kv,
            ffn_hidden_size=self.ffn, vocab_size=self.vocab, tie_embeddings=self.tied, latent_channels=1,
            latent_downsampling=1, image_sizes=((8, 8),), patch_size=8, attention="interval",
        )  # fmt: skip


def gelu(layers: int, size: int, heads: int, vocab: int, tied: bool = True) -> Dense:
    """A GPT with a feed-forward of 4 x size, as SwiGLU of as many weights."""
    return Dense(layers, size, heads, heads, round(8 * size / 3), vocab, tied)


@dataclass(frozen=True)
class Row:
    """A published figure. tokens: a second and GPU; gib: a GPU's; both None if not published."""

    project: str
    name: str
    model: Dense
    length: int
    gpus: int
    micro: int
    batches: int
    """Micro-batches of a step; a guess where the project does not say."""
    parallel: dict
    tokens: float | None
    gib: float | None = None
    recompute: str = "none"
    compiled: bool = False
    calibrates: bool = False
    traits: tuple[tuple[str, object], ...] = ()


WHOLE_LOGITS = Software(logits_are_whole=True, logit_traffic=52.0, logit_bytes=12.0)
"""PyTorch's cross-entropy: float32 logits, their log-softmax and its gradient."""
FSDP = replace(
    WHOLE_LOGITS,
    keeps_weight_copy=False,
    keeps_average=False,
    bucket_numbers=0,
    sharded_overlap=1.0,
    selective="alternate",
)
MEGATRON = replace(
    WHOLE_LOGITS, logit_traffic=20.0, logit_bytes=8.0, is_compiled=True, rope_traffic=4.0,
    keeps_average=False, shards_gradients_at_step=True, data_overlap=1.0, tensor_overlap=0.3,
    attention_rate=1.5,
)  # fmt: skip
NANOTRON = replace(WHOLE_LOGITS, rope_traffic=10.0, keeps_average=False, shards_gradients_at_step=True)
PROJECTS = {
    "llm-foundry": (replace(FSDP, rope_traffic=0.0, reduced_bytes=2), "h100"),
    "torchtitan": (FSDP, "h100-500w"),
    "Megatron-LM": (MEGATRON, "h100"),
    "nanotron": (NANOTRON, "h100"),
}
"""Traits and card of each project."""

MPT1, MPT3, MPT7 = gelu(24, 2048, 16, 50368), gelu(32, 2560, 20, 50368), gelu(32, 4096, 32, 50368)
MPT13, MPT30, MPT70 = gelu(40, 5120, 40, 50368), gelu(48, 7168, 56, 50368), gelu(80, 8192, 64, 50368)
LLAMA8, LLAMA70 = Dense(32, 4096, 32, 8, 14336, 128256), Dense(80, 8192, 64, 8, 28672, 128256)
NANO1 = Dense(16, 2048, 32, 32, 8192, 131072, tied=True)
NANO3 = Dense(28, 3072, 24, 24, 8192, 131072, tied=True)
NANO8 = Dense(32, 4096, 32, 32, 14336, 131072)


def _foundry(name: str, model: Dense, length: int, gpus: int, micro: int, full: bool, tokens: float) -> Row:
    return Row(
        "llm-foundry", name, model, length, gpus, micro, 4 if gpus < 128 else 1, {"zero_stage": 3}, tokens,
        recompute="full" if full else "none", calibrates=(name, length, gpus) == ("7b", 2048, 8),
    )  # fmt: skip


def _titan(name: str, model: Dense, gpus: int, micro: int, tensor: int, tokens: float, gib: float | None,
           compiled: bool, recompute: str = "selective") -> Row:  # fmt: skip
    parallel = {"zero_stage": 3, "tensor": tensor, "sequence": tensor > 1}
    calibrates = (name, gpus, compiled) == ("8B", 8, True)
    traits = (("rope_traffic", 4.0),) if compiled else ()
    return Row("torchtitan", name, model, 8192, gpus, micro, 1, parallel, tokens, gib, recompute, compiled,
               calibrates, traits)  # fmt: skip


def _megatron(
    name: str, model: Dense, gpus: int, tensor: int, pipeline: int, batch: int, teraflops: float
) -> Row:
    """Tokens from its formula: 72 B S l h^2 (1 + S / 6h + V / 12lh) FLOPs a step."""
    factor = 1 + 4096 / (6 * model.size) + model.vocab / (12 * model.layers * model.size)
    tokens = teraflops * 1e12 / (72 * model.layers * model.size**2 * factor)
    data = gpus // (tensor * pipeline)
    parallel = {"tensor": tensor, "sequence": tensor > 1, "pipeline": pipeline}
    return Row("Megatron-LM", name, model, 4096, gpus, 1, batch // data, parallel, tokens,
               calibrates=name == "7.1B")  # fmt: skip


def _nanotron(name: str, model: Dense, nodes: int, mfu: float, gib: float, data: int, tensor: int,
              pipeline: int, micro: int) -> Row:  # fmt: skip
    """Tokens from its formula: 3 forward passes with dense attention and the head; 256 rows a step."""
    matrices = model.layers * (2 * model.size * model.size * 2 + 3 * model.size * model.ffn)
    flops = 6 * (matrices + model.vocab * model.size) + 12 * model.layers * model.size * 4096
    parallel = {"tensor": tensor, "sequence": tensor > 1, "pipeline": pipeline}
    return Row("nanotron", name, model, 4096, 8 * nodes, micro, 256 // (data * micro), parallel,
               mfu / 100 * 989.5e12 / flops, gib, calibrates=(name, nodes) == ("3.57B", 1))  # fmt: skip


ROWS = [
    *(_foundry("1b", MPT1, *row) for row in (
        (2048, 8, 14, False, 45_455), (4096, 8, 7, False, 38_535), (8192, 8, 3, False, 29_157),
        (16384, 8, 2, False, 19_649), (32768, 8, 1, False, 12_025), (65536, 8, 1, True, 5_506),
        (2048, 64, 20, False, 44_402), (2048, 512, 12, False, 39_837))),
    *(_foundry("3b", MPT3, *row) for row in (
        (2048, 16, 10, False, 24_142), (4096, 8, 5, False, 20_964), (8192, 8, 3, False, 16_578),
        (32768, 8, 3, True, 5_873), (2048, 512, 8, False, 21_664))),
    *(_foundry("7b", MPT7, *row) for row in (
        (2048, 8, 6, False, 10_643), (4096, 8, 16, True, 8_611), (8192, 8, 8, True, 6_935),
        (32768, 8, 2, True, 3_318), (2048, 128, 6, False, 10_475), (2048, 512, 6, False, 9_670))),
    _foundry("13b", MPT13, 4096, 8, 10, True, 4_717),
    _foundry("30b", MPT30, 2048, 32, 14, True, 2_308),
    _foundry("70b", MPT70, 2048, 128, 8, True, 1_058),
    _foundry("70b", MPT70, 2048, 512, 8, True, 1_007),
    _titan("8B", LLAMA8, 8, 2, 1, 5_762, 82.4, False),
    _titan("8B", LLAMA8, 8, 2, 1, 6_667, 77.0, True),
    _titan("8B", LLAMA8, 128, 2, 1, 6_514, 62.0, True),
    _titan("8B", LLAMA8, 128, 2, 1, 5_605, 67.0, False),
    _titan("70B", LLAMA70, 256, 16, 8, 597, None, True, "full"),
    _megatron("1.7B", gelu(24, 2048, 16, 131072, False), 48, 1, 1, 192, 408.8),
    _megatron("7.1B", gelu(30, 4096, 32, 131072, False), 96, 2, 1, 192, 465.9),
    _megatron("16B", gelu(32, 6144, 48, 131072, False), 192, 4, 1, 192, 489.1),
    _megatron("32B", gelu(48, 7168, 56, 131072, False), 384, 8, 1, 192, 459.6),
    _nanotron("1.34B", NANO1, 1, 44.3, 41.8, 4, 1, 2, 4),
    _nanotron("1.34B", NANO1, 2, 41.6, 19.5, 8, 1, 2, 1),
    _nanotron("1.34B", NANO1, 4, 38.4, 16.4, 16, 1, 2, 1),
    _nanotron("1.34B", NANO1, 8, 32.5, 16.3, 32, 1, 2, 1),
    _nanotron("3.57B", NANO3, 1, 46.7, 56.9, 4, 1, 2, 2),
    _nanotron("3.57B", NANO3, 2, 43.8, 54.3, 8, 1, 2, 2),
    _nanotron("3.57B", NANO3, 4, 40.4, 53.3, 16, 1, 2, 2),
    _nanotron("3.57B", NANO3, 8, 35.5, 36.7, 32, 1, 2, 1),
    _nanotron("8.86B", NANO8, 1, 45.2, 63.1, 2, 1, 4, 1),
    _nanotron("8.86B", NANO8, 2, 43.9, 58.3, 4, 4, 1, 4),
    _nanotron("8.86B", NANO8, 4, 43.3, 61.1, 16, 1, 2, 1),
    _nanotron("8.86B", NANO8, 8, 39.5, 59.1, 32, 1, 2, 1),
]  # fmt: skip


@cache
def card(name: str) -> Chip:
    """A chip by name, and torchtitan's H100 of 500 W: 96 GB of HBM2e at 2.4 TB/s."""
    if name != "h100-500w":
        return load_chip(name)
    return replace(load_chip("h100"), name=name, memory_bandwidth=0.84 * 2.4e12, memory_bytes=95 * 2**30)


def job_of_row(row: Row) -> Job:
    parallel = ParallelConfig(**row.parallel)
    others = parallel.tensor * parallel.pipeline
    train = TrainConfig(
        num_steps=1,
        global_batch_size=row.micro * row.batches * row.gpus // others,
        micro_batch_size=row.micro,
        precision="bf16",
        recompute=row.recompute,
        compile=row.compiled,
    )
    # A tied model on several stages has a copy of the embedding on the last.
    model = replace(row.model, tied=row.model.tied and parallel.pipeline == 1).config()
    return Job(model, train, parallel, row.length, 1, row.gpus, "whole")


def plan_row(row: Row, product_rate: float = 1.0) -> Plan:
    software, chip = PROJECTS[row.project]
    software = replace(software, product_rate=product_rate, is_compiled=row.compiled or software.is_compiled)
    software = replace(software, **dict(row.traits))
    return plan_job(job_of_row(row), card(chip), software)


def tokens_per_gpu(plan: Plan) -> float:
    return plan.step.tokens_per_second / plan.job.world_size


@cache
def product_rate(project: str) -> float:
    """The rate of products with which the project's calibrating row is met, by bisection."""
    row = next(row for row in ROWS if row.project == project and row.calibrates)
    low, high = 0.2, 2.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if tokens_per_gpu(plan_row(row, middle)) > row.tokens else (middle, high)
    return low


@dataclass(frozen=True)
class Comparison:
    row: Row
    tokens: float
    gib: float

    @property
    def tokens_error(self) -> float | None:
        return self.tokens / self.row.tokens - 1 if self.row.tokens else None

    @property
    def gib_error(self) -> float | None:
        return self.gib / self.row.gib - 1 if self.row.gib else None


@cache
def comparisons() -> tuple[Comparison, ...]:
    found = []
    for row in ROWS:
        plan = plan_row(row, product_rate(row.project))
        found.append(Comparison(row, tokens_per_gpu(plan), plan.memory.total / 2**30))
    return tuple(found)


def table() -> str:
    """Markdown: every row, planned and published."""
    lines = ["| project | model | S | GPUs | layout | published tokens/s a GPU | planned | GiB | planned |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for each in comparisons():
        row = each.row
        degrees = [f"{k} {v}" for k, v in row.parallel.items() if k in ("tensor", "pipeline") and v > 1]
        zero = row.parallel.get("zero_stage", 1)
        layout = ", ".join([f"ZeRO {zero}", *degrees, f"{row.micro} rows", f"recompute {row.recompute}"])
        layout += ", compiled" if row.compiled else ""
        error = "sets the rate" if row.calibrates else f"{each.tokens_error:+.0%}"
        memory = f"{row.gib} | {each.gib:.1f} ({each.gib_error:+.0%})" if row.gib else "- | -"
        lines.append(
            f"| {row.project} | {row.name} | {row.length:,} | {row.gpus} | {layout} | {row.tokens:,.0f} | "
            f"{each.tokens:,.0f} ({error}) | {memory} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
    print({project: round(product_rate(project), 3) for project in PROJECTS})
