"""Inputs of a run that this machine does not see. Imports no torch."""

from collections.abc import Iterator
from pathlib import Path

from megafusion.checkpoint.folder import newest_step
from megafusion.data.manifest import MANIFEST
from megafusion.train.config import RunConfig


def missing_inputs(config: RunConfig) -> Iterator[str]:
    """Keys and paths of inputs that are not there. A login node need not see all that the nodes do."""
    data, init_from, aligned = config.data, config.train.init_from, config.objective.alignment
    for key, sources in (
        ("data", data.sources),
        ("data.validation", data.validation.sources if data.validation else {}),
    ):
        for name, source in sources.items():
            if "://" not in source.path and not (Path(source.path) / MANIFEST).is_file():
                yield f"{key}.sources.{name}.path {source.path}"
    if not data.tokenizer.exists():
        yield f"data.tokenizer {data.tokenizer}"
    if not data.vae.is_dir():
        yield f"data.vae {data.vae}"
    if init_from and not init_from.is_dir() and not newest_step(config.out):
        yield f"train.init_from {init_from}"
    if aligned and not aligned.model.is_dir():
        yield f"objective.alignment.model {aligned.model}"
