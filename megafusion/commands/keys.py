"""`megafusion keys`."""

from typing import Annotated, Literal

import typer

from megafusion.config import Config, keys_of
from megafusion.errors import UserError


def keys(
    command: Annotated[
        Literal["train", "preprocess", "train-vae"], typer.Argument(help="Whose configuration.")
    ],
    under: Annotated[str, typer.Argument(help="Prefix of the keys to list, such as data.")] = "",
) -> None:
    """List the keys of a configuration: the default of each, or that it is required, and what it means.

    Example: megafusion keys train optimizer.
    """
    found = [key for key in keys_of(_config_class(command)) if key.path.startswith(under)]
    if not found:
        raise UserError(f"no key of {command} begins with {under!r}; leave it out to list all")
    for key in found:
        choices = f" of {', '.join(map(str, key.choices))}" if key.choices else ""
        typer.echo(f"{key.path}: {key.default}{choices}\n    {key.about}")


def _config_class(command: str) -> type[Config]:
    if command == "train":
        from megafusion.train.config import RunConfig

        return RunConfig
    if command == "preprocess":
        from data_prep.config import PreprocessConfig

        return PreprocessConfig
    from data_prep.vae.config import AutoencoderConfig

    return AutoencoderConfig
