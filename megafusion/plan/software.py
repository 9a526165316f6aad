"""The traffic and overlap of a trainer beside its matrix products, in numbers that its code fixes."""

from dataclasses import dataclass
from typing import Literal

from megafusion.engine.config import TrainConfig
from megafusion.model.config import BackendName

BUCKET_SIZE, SMALL_SHARE = 2**25, 2**20
"""Float32 numbers in a bucket at most, and in a rank's share of a group that has more than one bucket: of
engine/buckets.py, which imports torch."""


@dataclass(frozen=True)
class Software:
    """The defaults are DeepSpeed 0.19.8's, eager, in bf16; `of_run` gives this project's.

    Traffic is bytes of device memory read and written.
    """

    product_rate: float = 1.0
    """Achieved matrix products, relative to the chip's `product_flops`."""
    attention_rate: float = 1.0
    attention_is_dense: bool = False
    """Attention computes masked pairs too, at the chip's `sdpa_flops`."""
    is_compiled: bool = False
    """Norms, rope and activations are fused."""
    keeps_silu: bool = True
    """SwiGLU keeps silu(gate) for backward, as autograd would, where it is not compiled."""
    fuses_norms: bool = True
    """RMSNorm saves its input alone; on CPUs PyTorch saves the normalized input as well."""
    rope_traffic: float = 50.0
    """Of queries and keys, per number and its bytes: in float32, from many operations."""
    logits_are_whole: bool = False
    """The head reads every position, and logits stay until backward; else chunks of the text targets."""
    logit_traffic: float = 64.0
    """Of the head's logits and their cross-entropy, a logit."""
    logit_bytes: float = 10.0
    """Held at the loss's peak, a logit that is there at once: itself, and float32 copies of it."""
    selective: Literal["products", "alternate"] = "products"
    """Activations that selective recompute keeps: all products, or every other and attention (torchtitan)."""
    keeps_weight_copy: bool = True
    """Half-precision weights stay beside float32 masters, as in DeepSpeed; FSDP casts when it gathers."""
    keeps_average: bool = True
    shards_gradients_at_step: bool = False
    """ZeRO 1 reduces gradients to their owners, as here; DeepSpeed all-reduces them."""
    updates_in_one_pass: bool = False
    """Without offload: at ZeRO 1 and 2, one kernel adds each gradient to float32 sums, which are reduced in
    buckets (engine/buckets.py); at ZeRO 1 to 3, one kernel after the norm clips, updates and averages
    (engine/fused_update.py)."""
    reduced_bytes: int = 4
    """Of a gradient on the wire."""
    bucket_numbers: float = 5e8
    """Numbers in DeepSpeed's reduce buckets."""
    data_overlap: float = 0.0
    """Share of backward under which data-parallel collectives hide, at ZeRO 0 and 1; not measured yet."""
    sharded_overlap: float = 0.7
    """The same at ZeRO 2 and 3, of forward and backward."""
    tensor_overlap: float = 0.0
    """Share of tensor-parallel communication that hides under products."""
    host_seconds: float = 3e-3
    """Of a step in which the device waits for the host."""

    @property
    def saves_silu(self) -> bool:
        """Whether silu(gate) stays until backward, which else computes it again."""
        return self.keeps_silu and not self.is_compiled


def of_run(train: TrainConfig, attention: BackendName) -> Software:
    """This project's code as a configuration uses it on a GPU."""
    return Software(
        attention_is_dense=attention == "sdpa" or train.precision == "fp32",
        is_compiled=train.compile,
        keeps_silu=False,
        rope_traffic=4.0 if train.compile else 50.0,
        updates_in_one_pass=True,
        shards_gradients_at_step=True,
        logit_traffic=8.0 if train.compile else 64.0,
        logit_bytes=2.0 if train.compile else 10.0,
    )
