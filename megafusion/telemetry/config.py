"""Configuration of metrics and trackers."""

from typing import Literal

from pydantic import Field, model_validator

from megafusion.config import Config


class TelemetryConfig(Config):
    """How often metrics are logged, and which trackers receive them."""

    log_every: int = Field(10, gt=0)
    """Steps between two lines of metrics."""
    trackers: tuple[Literal["tensorboard", "wandb", "prometheus"], ...] = ("tensorboard",)
    """Trackers beside RUN/metrics.jsonl: RUN/tensorboard; Weights & Biases (extra `wandb`, offline with
    WANDB_MODE=offline); RUN/metrics.prom, for the textfile collector of node_exporter."""
    wandb_project: str | None = None
    """Project in Weights & Biases; null for its default."""

    @model_validator(mode="after")
    def _consistent(self) -> "TelemetryConfig":
        if self.wandb_project and "wandb" not in self.trackers:
            raise ValueError(
                f"telemetry.wandb_project {self.wandb_project!r} is set, but telemetry.trackers "
                f"{list(self.trackers)} does not contain wandb; add it there"
            )
        return self
