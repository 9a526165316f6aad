"""`megafusion import`."""

from pathlib import Path
from typing import Annotated

import typer

from megafusion.images.sizes import parse_size


def import_model(
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder of a text model.")],
    out: Annotated[Path, typer.Option(help="YAML file to write.")],
    image_size: Annotated[
        list[str],
        typer.Option(help="Height and width of images; repeat for several.", metavar="HxW"),
    ],
    vae: Annotated[
        Path, typer.Option(help="The run's autoencoder, a diffusers AutoencoderKL folder.")
    ] = Path("data_prep/vae"),
    patch_size: Annotated[int, typer.Option(help="Side of a patch in latents: 1, 2, 4 or 8.")] = 2,
) -> None:
    """Write the part of a run's configuration that starts it from a text model: model, tokenizer, init_from.

    Example: megafusion import models/SmolLM2-135M --out smollm2.yaml --image-size 256x256
    """
    from megafusion.hub.folder import import_config

    sizes = [parse_size(size, "--image-size") for size in image_size]
    typer.echo(import_config(folder, out, sizes, vae, patch_size))
