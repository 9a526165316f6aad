"""Receivers of a run's metrics: RUN/metrics.jsonl, TensorBoard, Weights & Biases, Prometheus."""

import importlib.util
import json
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from megafusion.errors import UserError
from megafusion.storage import write_file
from megafusion.telemetry.config import TelemetryConfig
from megafusion.telemetry.metrics_file import METRICS


class Tracker:
    """One receiver, open on rank 0 alone."""

    def log(self, step: int, values: dict[str, float]) -> None:
        raise NotImplementedError

    def log_samples(self, step: int, sheet: Image.Image, captions: str) -> None:
        """Record a sheet of sample images; a receiver of numbers ignores it."""

    def close(self) -> None:
        """Release what the tracker holds."""


def check_trackers(config: TelemetryConfig) -> None:
    """Raise UserError if a tracker needs a package that is not installed."""
    if "wandb" in config.trackers and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "telemetry.trackers: wandb is not installed; pip install 'megafusion[wandb]' or remove it"
        )


def open_trackers(config: TelemetryConfig, folder: Path, first_step: int) -> list[Tracker]:
    """metrics.jsonl, and the configured trackers, of a run that has done `first_step` steps."""
    openers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(folder, first_step),
        "wandb": lambda: Wandb(folder, config.wandb_project),
        "prometheus": lambda: Prometheus(folder),
    }
    return [JsonLines(folder), *(openers[name]() for name in dict.fromkeys(config.trackers))]


class JsonLines(Tracker):
    """RUN/metrics.jsonl, in append mode."""

    def __init__(self, folder: Path):
        self._file = (folder / METRICS).open("a")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()  # on a full disk the rest stays in the buffer until the next flush

    def close(self) -> None:
        self._file.close()


class TensorBoard(Tracker):
    """Event files in RUN/tensorboard."""

    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def log_samples(self, step: int, sheet: Image.Image, captions: str) -> None:
        self._board.add_image("samples", np.asarray(sheet), step, dataformats="HWC")
        self._board.add_text("captions", captions, step)

    def close(self) -> None:
        self._board.close()


class Wandb(Tracker):
    """A Weights & Biases run, resumed with the training run; files in RUN/wandb."""

    def __init__(self, folder: Path, project: str | None):
        import wandb

        id_file = folder / "wandb-id"
        if not id_file.is_file():
            write_file(id_file, secrets.token_hex(8))
        self._run = wandb.init(
            project=project, dir=folder, id=id_file.read_text(), name=folder.resolve().name, resume="allow"
        )
        # W&B drops values of a step of its own that it has seen; a run may roll back to a checkpoint.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def log_samples(self, step: int, sheet: Image.Image, captions: str) -> None:
        import wandb

        self._run.log({"step": step, "samples": wandb.Image(sheet, caption=captions)})

    def close(self) -> None:
        self._run.finish()


class Prometheus(Tracker):
    """RUN/metrics.prom in Prometheus' text format, replaced whole at each line. Opens no port."""

    def __init__(self, folder: Path):
        self._path, self._run = folder / "metrics.prom", folder.resolve().name

    def log(self, step: int, values: dict[str, float]) -> None:
        write_file(
            self._path, prometheus_text(self._run, {"step": step, "time_seconds": time.time(), **values})
        )


def prometheus_text(run: str, values: dict[str, float]) -> str:
    """Gauges `megafusion_NAME{run="..."}`; an invalid character of a name becomes an underscore."""
    label = run.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    lines = []
    for name, value in values.items():
        metric = "megafusion_" + re.sub(r"\W", "_", name, flags=re.ASCII)
        lines += [f"# TYPE {metric} gauge", f'{metric}{{run="{label}"}} {float(value)!r}']
    return "\n".join(lines) + "\n"
