"""How a training step is computed, and the optimizer. Imports no torch."""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from megafusion.config import Config
from megafusion.model.config import LoraConfig, is_lora_weight
from megafusion.parallel.config import Recompute

Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Config):
    """AdamW (arXiv 1711.05101) and the schedule of its learning rate."""

    learning_rate: float = Field(3e-4, gt=0)
    """Peak learning rate, reached after the warm-up."""
    learning_rates: dict[str, Annotated[float, Field(gt=0)]] = Field({})
    """Peak learning rates of weights whose names match a pattern, such as {"*.adapter.*": 1e-3}; the others
    have learning_rate. The schedule scales all alike, final_learning_rate too."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """The learning rate after the warm-up: cosine, to the last step; constant; wsd (warm-up, stable, decay:
    arXiv 2404.06395), constant and then linear. constant, and wsd before its decay, do not depend on
    num_steps, so a run can be made longer as if it had been so from the start."""
    final_learning_rate: float = Field(1.5e-5, ge=0)
    """Learning rate at the last step, where the cosine or the decay of wsd ends."""
    num_warmup_steps: int = Field(4000, ge=0)
    """Steps of linear warm-up."""
    decay_ratio: float = Field(0.1, gt=0, le=1)
    """Final fraction of num_steps over which wsd decays."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay rates of the first and the second moment."""
    epsilon: float = Field(1e-8, gt=0)
    """Added to the square root of the second moment."""
    weight_decay: float = Field(0.1, ge=0)
    """Weight decay of matrices and convolutions; vectors (biases, norms) have none."""
    gradient_clip: float = Field(1.0, ge=0)
    """Maximum global gradient norm; 0 disables clipping."""

    def learning_rate_scale(self, name: str) -> float:
        """A weight's learning rate over `learning_rate`. name: canonical."""
        own = (rate for pattern, rate in self.learning_rates.items() if fnmatchcase(name, pattern))
        return next(own, self.learning_rate) / self.learning_rate


class TrainConfig(Config):
    """Number of steps, batch sizes, precision and memory of a step."""

    renamed_keys: ClassVar[dict[str, str]] = {
        "global_batch_rows": "global_batch_size",
        "micro_batch_rows": "micro_batch_size",
        "checkpoint_every": ".checkpoint.every",
        "keep_last": ".checkpoint.keep_last",
        "keep_every": ".checkpoint.keep_every",
        "on_save_error": ".checkpoint.on_save_error",
        "log_every": ".telemetry.log_every",
        "trackers": ".telemetry.trackers",
        "wandb_project": ".telemetry.wandb_project",
        "timeout_seconds": ".resilience.timeout_seconds",
    }

    init_from: Path | None = None
    """Weights to start from, in place of random ones: a pipeline folder, a run, a checkpoint (step-*) or a
    Hugging Face folder of safetensors. A resumed run continues from its own checkpoint."""
    init_weights: Literal["ema", "raw"] = "ema"
    """Which weights of a run or checkpoint to start from: averaged or raw. Other folders hold one kind."""
    init_new: tuple[str, ...] = ()
    """Patterns, such as *.adapter.*, of the weights that may start at random where init_from lacks them or
    their last rows (new token ids)."""
    freeze: tuple[str, ...] = ()
    """Patterns, such as stem.* or blocks.*.attention.*, of the weights that stay as they start: without
    gradients, moments, float32 masters and average. They are saved all the same."""
    lora: LoraConfig | None = None
    num_steps: int = Field(gt=0)
    """Optimizer steps."""
    global_batch_size: int = Field(gt=0)
    """Packed sequences of an optimizer step, over all ranks."""
    micro_batch_size: int = Field(gt=0)
    """Packed sequences that a rank computes at a time; the rest is gradient accumulation."""
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """fp32; bf16, with float32 master weights, moments and gradient accumulation; fp8, which is bf16 with
    8-bit matrix products in the blocks, by transformer-engine (Hopper or later)."""
    recompute: Recompute = "none"
    """Activation checkpointing, what a block's backward pass recomputes: none; selective, attention and cheap
    operations; full, everything."""
    compile: bool = False
    """Whether torch.compile fuses the operations of blocks and cross-entropy."""
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    """Decay of the averaged weights; (1 + step) / (10 + step) where that is smaller."""

    def trains(self, name: str) -> bool:
        """Whether the weight of this canonical name is trained, not frozen."""
        if self.lora:
            return is_lora_weight(name)
        return not any(fnmatchcase(name, pattern) for pattern in self.freeze)
