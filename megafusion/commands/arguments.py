"""Arguments that several commands take, and what is done to those of all."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from megafusion.errors import UserError
from megafusion.storage import expand_path

TrainedModel = Annotated[
    Path, typer.Argument(help="Pipeline folder, run folder, or one checkpoint of a run.")
]
ConfigFile = Annotated[Path, typer.Argument(help="YAML file; examples are in configs/.", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Values that override the file's, as dotted.key=value.", metavar="[KEY=VALUE]..."),
]


def check_trained_model(path: Path) -> None:
    """Raise UserError for a path without a model, before torch is imported to open it."""
    from megafusion.checkpoint.folder import checkpoint_at

    has_pipeline = any((folder / "config.json").is_file() for folder in (path, path / "pipeline"))
    if not has_pipeline and not checkpoint_at(path):
        raise UserError(f"{path}: neither a pipeline folder, a run folder nor a checkpoint (step-*)")


def expand_paths(command: Callable[..., None]) -> Callable[..., None]:
    """The command, called with ~ and $NAME expanded in its paths: a shell expands no --out=~/drawn."""

    def expanded(value: Any) -> Any:
        if isinstance(value, list):
            return list(map(expanded, value))
        return Path(expand_path(value)) if isinstance(value, Path) else value

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        command(**{name: expanded(value) for name, value in arguments.items()})

    run.__doc__ = (command.__doc__ or "").replace("[", r"\[")  # which the help would take for markup
    return run
