"""One file describes a run."""

from pathlib import Path

from pydantic import Field, model_validator

from megafusion.config import Config
from megafusion.data.config import DataConfig
from megafusion.generate.sampling import SamplingConfig
from megafusion.model.transfusion import ModelConfig
from megafusion.objective.losses import ObjectiveConfig
from megafusion.train.optimizer import OptimizerConfig


class SamplesConfig(Config):
    """Pictures drawn and captions written while training, to look at."""

    every: int = Field(0, ge=0)
    """Steps between two sample sheets; 0 for none."""
    num_pairs: int = Field(8, gt=0)
    """Pairs of the first pair source whose caption is drawn and whose picture is described."""


class TrainConfig(Config):
    """How long and how often."""

    num_steps: int = Field(gt=0)
    """Optimizer steps."""
    global_batch_rows: int = Field(gt=0)
    """Packed rows of an optimizer step, over all ranks."""
    micro_batch_rows: int = Field(gt=0)
    """Packed rows that a rank computes at a time; the rest is gradient accumulation."""
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    """Decay of the averaged weights, reached as (1 + step) / (10 + step) rises to it."""
    log_every: int = Field(10, gt=0)
    """Steps between two lines of metrics."""
    checkpoint_every: int = Field(1000, gt=0)
    """Steps between two checkpoints; one is always made at the end."""
    keep_last: int = Field(2, gt=0)
    """Checkpoints kept; older ones are deleted once a newer one is complete."""
    timeout_seconds: float = Field(600.0, gt=0)
    """Longest time without progress in one step, checkpoint or start-up before every rank writes its stacks
    and ends."""
    wandb_project: str | None = None
    """Weights & Biases project that also receives the metrics (extra `wandb`); null for none."""


class RunConfig(Config):
    """Everything that decides a run's numbers, and where it is kept."""

    out: Path
    """Run folder: frozen configuration, metrics, checkpoints, samples."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the initial weights and of the data order."""
    data: DataConfig
    model: ModelConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    sampling: SamplingConfig = SamplingConfig()
    samples: SamplesConfig = SamplesConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        positions = self.model.num_patches + 4  # bos, boi, eoi, eos
        if positions > self.data.sequence_length:
            raise ValueError(
                f"an image takes {positions} positions, more than data.sequence_length "
                f"{self.data.sequence_length}; raise it or model.patch_size"
            )
        if self.data.image_first_max_timestep > self.objective.schedule.num_steps:
            raise ValueError(
                f"data.image_first_max_timestep {self.data.image_first_max_timestep} is beyond "
                f"objective.schedule.num_steps {self.objective.schedule.num_steps}"
            )
        if self.sampling.num_steps > self.objective.schedule.num_steps:
            raise ValueError(
                f"sampling.num_steps {self.sampling.num_steps} is beyond objective.schedule.num_steps "
                f"{self.objective.schedule.num_steps}"
            )
        return self
