"""`megafusion preprocess`."""

from typing import Annotated

import typer

from megafusion.commands.arguments import ConfigFile, Overrides


def preprocess(
    config: ConfigFile,
    overrides: Overrides = None,
    shard_range: Annotated[
        str | None,
        typer.Option(
            help="Write every N-th shard from the I-th on, I from 0: one of N parallel tasks that share the "
            "output folder. The last one to finish writes the manifest.",
            metavar="I/N",
        ),
    ] = None,
) -> None:
    """Turn images, captions and text into shards: image latents, token ids, metadata, a manifest.

    Re-running the same command resumes where it was stopped, even by a kill.

    Example: megafusion preprocess configs/preprocess/quickstart.yaml out=data/mine num_workers=2
    """
    from data_prep.config import PreprocessConfig
    from megafusion.config import load_config

    values = load_config(PreprocessConfig, config, overrides or [])
    from data_prep.preprocess import parse_range
    from data_prep.preprocess import preprocess as run

    run(values, parse_range(shard_range) if shard_range else None)
