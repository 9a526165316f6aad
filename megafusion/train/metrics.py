"""What a run tells while it goes: a progress bar, JSON lines, TensorBoard, optionally W&B."""

import json
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from megafusion.errors import UserError
from megafusion.progress import progress_bar
from megafusion.storage import write_file
from megafusion.train.config import TrainConfig

METRICS = "metrics.jsonl"


class Metrics:
    """A context that opens every sink on rank 0, and is silent on the others."""

    def __init__(self, folder: Path, config: TrainConfig, first_step: int, silent: bool):
        self._silent, self._folder = silent, folder
        self._first_step, self._num_steps = first_step, config.num_steps
        self.progress = progress_bar(disable=silent)
        self._task = self.progress.add_task(
            "training", total=config.num_steps, completed=first_step, losses=""
        )
        if silent:
            return
        _forget_after(folder, first_step)
        self._lines = (folder / METRICS).open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        self._wandb = _start_wandb(config.wandb_project, folder) if config.wandb_project else None

    def __enter__(self) -> "Metrics":
        self.progress.start()
        if self._first_step and not self._silent:
            state = "is finished" if self._first_step >= self._num_steps else "goes on"
            self.progress.console.print(f"{self._folder}: {state} after step {self._first_step}")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()
        if not self._silent:
            self._lines.close()
            self._board.close()
            if self._wandb:
                self._wandb.finish()

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        self.progress.update(self._task, completed=step)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record numbers as they are after `step` updates."""
        if self._silent:
            return
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(values, step=step)
        shown = (
            f"text {values['text_loss']:.3f}  image {values['image_loss']:.4f}  "
            f"{values['tokens_per_second']:,.0f} tokens/s"
        )
        self.progress.update(self._task, losses=shown)
        if not self.progress.console.is_terminal:  # a log file shows no bar
            self.progress.console.print(f"step {step}  {shown}")

    def show(self, step: int, sheet: Image.Image, captions: str) -> None:
        """Record a sheet of sample pictures and the captions written."""
        self._board.add_image("samples", np.asarray(sheet), step, dataformats="HWC")
        self._board.add_text("captions", captions, step)
        if self._wandb:
            import wandb

            self._wandb.log({"samples": wandb.Image(sheet, caption=captions)}, step=step)


def read_metrics(folder: Path) -> list[dict]:
    """The recorded lines of a run, oldest first; one that a killed process left unfinished is no line."""
    path = folder / METRICS
    if not path.is_file():
        raise UserError(f"{path}: no metrics there; give the folder of a run that has trained")
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def _forget_after(folder: Path, step: int) -> None:
    """Drop lines of steps that are about to be run again after a resume."""
    if (folder / METRICS).is_file():
        kept = [line for line in read_metrics(folder) if line["step"] <= step]
        write_file(folder / METRICS, "".join(json.dumps(line) + "\n" for line in kept))


def _start_wandb(project: str, folder: Path):
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "train.wandb_project: wandb is not installed; pip install 'megafusion[wandb]' or set it to null"
        ) from error
    return wandb.init(project=project, dir=folder, id=folder.name, name=folder.name, resume="allow")
