"""`megafusion keys`, and docs/configuration.md: python -m megafusion.commands.keys > docs/configuration.md"""

from typing import Annotated, Literal, get_args

import typer

from megafusion.config import FROM_DATA, REQUIRED, Config, Key, keys_of, renamed_keys_of
from megafusion.errors import UserError

Command = Literal[
    "train", "preprocess", "train-tokenizer", "train-vae", "generate", "serve", "evaluate", "sweep"
]
REGENERATE = "python -m megafusion.commands.keys > docs/configuration.md"


def keys(
    command: Annotated[Command, typer.Argument(help="Whose configuration.")],
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


def reference() -> str:
    """docs/configuration.md: every key of every configuration, and the renamed ones."""
    lines = [
        "# Configuration",
        "",
        "Every key of the configuration files, and of `megafusion generate --option`.",
        "NAME is a name of your choice.",
        "Values after the file override it: `megafusion train configs/quickstart.yaml train.num_steps=50`.",
        "Keys are text, each once; `true` and `false` alone are booleans; `yes`, `010` and `12:30` are text.",
        "In paths, `~` and `$NAME` are expanded.",
        "An unknown key is refused with the nearest valid ones. `megafusion keys train data.` prints a part.",
        "",
        f"Generated from the configuration classes: `{REGENERATE}`.",
    ]
    renamed = ["", "## Renamed keys", "", "Keys of version 0.1. They are refused with their new name.", ""]
    renamed += ["| command | key of 0.1 | now |", "|---|---|---|"]
    for command in get_args(Command):
        cls = _config_class(command)
        lines += ["", f"## megafusion {command}", "", "| key | default | meaning |", "|---|---|---|"]
        lines += map(_row, keys_of(cls))
        for old, new in renamed_keys_of(cls):
            renamed.append(f"| {command} | `{old}` | {', '.join(f'`{name}`' for name in new)} |")
    lines += renamed
    return "\n".join(lines) + "\n"


def _row(key: Key) -> str:
    about = key.about
    if key.choices:
        about += f" Choices: {', '.join(f'`{choice}`' for choice in key.choices)}."
    default = key.default if key.default in (REQUIRED, FROM_DATA) else f"`{key.default}`"
    return f"| `{key.path}` | {default} | {about.replace('|', chr(92) + '|')} |"


def _config_class(command: str) -> type[Config]:
    if command == "train":
        from megafusion.train.config import RunConfig

        return RunConfig
    if command == "preprocess":
        from data_prep.config import PreprocessConfig

        return PreprocessConfig
    if command == "train-tokenizer":
        from data_prep.tokenizer.config import TokenizerConfig

        return TokenizerConfig
    if command == "generate":
        from megafusion.objective.config import SamplingConfig

        return SamplingConfig
    if command == "serve":
        from megafusion.serve.config import ServeConfig

        return ServeConfig
    if command == "evaluate":
        from megafusion.evaluate.config import EvaluateConfig

        return EvaluateConfig
    if command == "sweep":
        from megafusion.sweep.config import SweepConfig

        return SweepConfig
    from data_prep.vae.config import AutoencoderConfig

    return AutoencoderConfig


if __name__ == "__main__":
    print(reference(), end="")
