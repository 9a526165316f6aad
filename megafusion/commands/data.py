"""`megafusion data`: inspect and verify folders of shards."""

from pathlib import Path
from typing import Annotated

import typer

from megafusion.commands.arguments import expand_paths

app = typer.Typer(
    no_args_is_help=True,
    help="Inspect folders of shards, or verify them.\n\n"
    "Example: megafusion data inspect data/quickstart/pairs",
)

Shards = Annotated[Path, typer.Argument(help="Folder of shards: OUT/pairs or OUT/text of preprocess.")]


@app.command()
@expand_paths
def inspect(
    shards: Shards,
    vae: Annotated[Path, typer.Option(help="Autoencoder that made the latents.")] = Path("data_prep/vae"),
    out: Annotated[Path, typer.Option(help="PNG file for the images.")] = Path("shards.png"),
    num: Annotated[int, typer.Option(help="Documents to show, evenly spaced.", min=1)] = 32,
) -> None:
    """Count what a folder of shards holds, and draw a page of its images, decoded, with their captions.

    Example: megafusion data inspect data/quickstart/pairs --out pairs.png
    """
    from megafusion.data.inspect import inspect_shards

    inspect_shards(shards, vae, out, num)


@app.command()
@expand_paths
def verify(shards: Shards) -> None:
    """Hash every shard and rebuild its index; exit status 2 names the first file that differs.

    Example: megafusion data verify data/quickstart/pairs
    """
    from megafusion.data.inspect import verify_shards

    verify_shards(shards)
