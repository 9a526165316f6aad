"""Inputs of a run that this machine does not see. Imports no torch."""

from collections.abc import Iterator
from pathlib import Path

from megafusion.data.config import DataConfig
from megafusion.data.manifest import MANIFEST


def missing_inputs(data: DataConfig, init_from: Path | None) -> Iterator[str]:
    """Keys and paths of inputs that are not there. A login node need not see all that the nodes do."""
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
    if init_from and not init_from.is_dir():
        yield f"train.init_from {init_from}"
