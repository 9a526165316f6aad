"""`megafusion preprocess`, `train-tokenizer`, `train-vae` and `report`: the commands of data_prep/."""

from pathlib import Path
from typing import Annotated

import typer

from megafusion.commands.arguments import ConfigFile, Overrides
from megafusion.config import load_config


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

    values = load_config(PreprocessConfig, config, overrides or [])
    for warning in values.warnings():
        typer.echo(warning, err=True)
    from data_prep.preprocess import parse_range
    from data_prep.preprocess import preprocess as run

    run(values, parse_range(shard_range) if shard_range else None)


def train_tokenizer(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train a tokenizer on captions and texts: a SentencePiece model, for preprocess and train.

    Example: megafusion train-tokenizer configs/tokenizer/emoji.yaml out=runs/tokenizer.model vocab_size=1000
    """
    from data_prep.tokenizer.config import TokenizerConfig

    values = load_config(TokenizerConfig, config, overrides or [])
    from data_prep.tokenizer.train import train_tokenizer as run

    typer.echo(run(values))


def train_vae(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train the autoencoder that encodes images into latents (a diffusers AutoencoderKL folder), or into the
    codes of a codebook (a VQModel).

    Example: megafusion train-vae configs/vae/emoji.yaml out=runs/vae
    """
    from data_prep.vae.config import AutoencoderConfig

    values = load_config(AutoencoderConfig, config, overrides or [])
    for warning in values.warnings():
        typer.echo(warning, err=True)
    from data_prep.vae.train import train_autoencoder

    report = train_autoencoder(values)
    typer.echo(f"held-out PSNR {report['psnr']:.2f} dB after {report['num_steps']} steps")


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
