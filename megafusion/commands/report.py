"""`megafusion report`."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    run_folder: Annotated[Path, typer.Argument(help="Folder of a finished run.", metavar="RUN")],
    images: Annotated[Path, typer.Option(help="Tar of the images that the run was trained on.")] = Path(
        "data_prep/emoji/emoji-000000.tar"
    ),
    classifier: Annotated[Path, typer.Option(help="Weights of a classifier of those images.")] = Path(
        "data_prep/emoji/classifier.safetensors"
    ),
    seconds_before: Annotated[
        float, typer.Option(help="Seconds from the first command to this one, for the total.", min=0)
    ] = 0.0,
) -> None:
    """Measure a quickstart run and show it: samples.png, captions.txt, losses.png, report.json.

    Example: megafusion report runs/quickstart
    """
    from data_prep.emoji.report import write_report

    report = write_report(run_folder, images, classifier, seconds_before)
    for name, value in report.items():
        typer.echo(f"{name}: {value}")
    typer.echo(f"look at {run_folder / 'samples.png'}, captions.txt and losses.png beside it")
