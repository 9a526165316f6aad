"""The interface of a suite, and the work of several processes on it: resumable, and equal for any number."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megafusion.errors import UserError
from megafusion.processes import world_size
from megafusion.progress import progress_bar
from megafusion.storage import file_sha256, folder_sha256, read_json, write_file

if TYPE_CHECKING:
    from megafusion.generate.pipeline import TransfusionPipeline

Metrics = dict[str, float | int]
RECIPE = "recipe.json"
MODEL_FILES = (".safetensors", ".json", ".txt", ".model")
"""Of folders of transformers: weights, configurations and vocabularies. Other weights are not read."""


class Suite(Protocol):
    """One kind of measurement. Its items are divided into batches, of which each process measures some."""

    name: str
    items: Sequence[Any]
    recipe: dict[str, Any]
    """Inputs and options, as JSON, that its records depend on besides the model."""

    def measure(self, pipeline: "TransfusionPipeline", first: int, items: Sequence[Any]) -> list[dict]:
        """A record, as JSON, of each item of a batch; `first` is the index of the first."""

    def summarize(self, records: list[dict], device: Any) -> dict[str, Metrics]:
        """Metrics by group, of the records of all items."""


def run_batches(
    suite: Suite, pipeline: "TransfusionPipeline", batch_size: int, folder: Path
) -> list[dict] | None:
    """Measure this process's batches that have no record in `folder` yet.

    Returns the records of all items; None while other processes have not written theirs. RANK and WORLD_SIZE
    of a launcher divide the batches; the processes share nothing but the folder.
    """
    rank, world = int(os.environ.get("RANK") or 0), world_size()
    starts = range(0, len(suite.items), batch_size)
    paths = [folder / f"batch-{number:06d}.json" for number in range(len(starts))]
    with progress_bar(disable=rank > 0) as progress:
        task = progress.add_task(suite.name, total=len(paths[rank::world]), losses="")
        for first, path in list(zip(starts, paths, strict=True))[rank::world]:
            if not path.is_file():
                records = suite.measure(pipeline, first, suite.items[first : first + batch_size])
                write_file(path, json.dumps({"records": records}) + "\n")
            progress.advance(task)
    if not all(path.is_file() for path in paths):
        return None
    return [record for path in paths for record in read_json(path, "delete it")["records"]]


def refuse_other_model(out: Path, model: dict[str, Any]) -> None:
    """UserError if a suite in the folder is of another model: the report would mix their figures."""
    for path in sorted(out.glob(f"*/{RECIPE}")):
        if read_json(path, "choose another --out").get("model") != model:
            raise UserError(
                f"{path.parent}: holds results of another model (see {path}); choose another --out"
            )


def claim_folder(folder: Path, recipe: dict[str, Any]) -> None:
    """Write a recipe into a folder, or raise UserError if the folder holds records of another recipe."""
    path, recipe = folder / RECIPE, json.loads(json.dumps(recipe))
    # Listed first, so that what another process writes after its recipe is not taken for a stranger's.
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    if not path.is_file():
        if any(not name.startswith(".") and name != RECIPE for name in names):
            raise UserError(f"{folder}: holds other files; choose another --out")
        write_file(path, json.dumps(recipe, indent=1) + "\n")
    found = read_json(path, "choose another --out")
    if changed := sorted(key for key in found | recipe if found.get(key) != recipe.get(key)):
        raise UserError(
            f"{folder}: holds results with another {', '.join(changed)} (see {path}); choose another --out"
        )


def model_sha256(path: Path) -> str:
    """Hex digest of a judging model: a file of weights, or a folder of transformers."""
    return folder_sha256(path, MODEL_FILES) if path.is_dir() else file_sha256(path)
