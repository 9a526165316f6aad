"""Who receives a run's metrics beside its own file: TensorBoard, W&B, a file for Prometheus."""

import importlib.util
import re
import secrets
import time
from typing import Protocol

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from megafusion.engine.config import TrainConfig
from megafusion.errors import UserError
from megafusion.storage import write_file
from megafusion.train.config import RunConfig


class Tracker(Protocol):
    """Opened on rank 0 alone."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def show(self, step: int, sheet: Image.Image, captions: str) -> None: ...

    def close(self) -> None: ...


def check_trackers(config: TrainConfig) -> None:
    """UserError where a tracker needs a package that is not there."""
    if "wandb" in config.trackers and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "train.trackers: wandb is not installed; pip install 'megafusion[wandb]' or leave it out"
        )


def open_trackers(config: RunConfig, first_step: int) -> list[Tracker]:
    """Those that the configuration names, for a run that goes on after a step."""
    openers = {"tensorboard": TensorBoard, "wandb": Wandb, "prometheus": Prometheus}
    return [openers[name](config, first_step) for name in dict.fromkeys(config.train.trackers)]


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, config: RunConfig, first_step: int):
        self._board = SummaryWriter(str(config.out / "tensorboard"), purge_step=first_step)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def show(self, step: int, sheet: Image.Image, captions: str) -> None:
        self._board.add_image("samples", np.asarray(sheet), step, dataformats="HWC")
        self._board.add_text("captions", captions, step)

    def close(self) -> None:
        self._board.close()


class Wandb:
    """A run of Weights & Biases, which goes on with this one; files in RUN/wandb."""

    def __init__(self, config: RunConfig, first_step: int):
        import wandb

        name = config.out.resolve().name
        identity = config.out / "wandb-id"
        if not identity.is_file():
            write_file(identity, secrets.token_hex(8))
        self._run = wandb.init(
            project=config.train.wandb_project,
            dir=config.out,
            id=identity.read_text(),
            name=name,
            resume="allow",
        )
        # W&B drops what comes under a step of its own that it has seen; a run may go back to a checkpoint.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def show(self, step: int, sheet: Image.Image, captions: str) -> None:
        import wandb

        self._run.log({"step": step, "samples": wandb.Image(sheet, caption=captions)})

    def close(self) -> None:
        self._run.finish()


class Prometheus:
    """RUN/metrics.prom in Prometheus' text format, replaced whole at each line; nothing listens.

    A link to it in the folder of node_exporter's textfile collector (--collector.textfile.directory) has it
    scraped.
    """

    def __init__(self, config: RunConfig, first_step: int):
        self._path, self._run = config.out / "metrics.prom", config.out.resolve().name

    def log(self, step: int, values: dict[str, float]) -> None:
        write_file(
            self._path, prometheus_text(self._run, {"step": step, "time_seconds": time.time(), **values})
        )

    def show(self, step: int, sheet: Image.Image, captions: str) -> None:
        pass  # it takes numbers alone

    def close(self) -> None:
        pass


def prometheus_text(run: str, values: dict[str, float]) -> str:
    """Gauges `megafusion_NAME{run="..."}`; what a name may not hold becomes an underscore."""
    label = run.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    lines = []
    for name, value in values.items():
        metric = "megafusion_" + re.sub(r"\W", "_", name, flags=re.ASCII)
        lines += [f"# TYPE {metric} gauge", f'{metric}{{run="{label}"}} {float(value)!r}']
    return "\n".join(lines) + "\n"
