"""`megafusion train-vae`."""

import typer

from megafusion.commands.arguments import ConfigFile, Overrides


def train_vae(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train the autoencoder that encodes images into latents (a diffusers AutoencoderKL folder).

    Example: megafusion train-vae configs/vae/emoji.yaml out=runs/vae
    """
    from data_prep.vae.config import AutoencoderConfig
    from megafusion.config import load_config

    values = load_config(AutoencoderConfig, config, overrides or [])
    for warning in values.warnings():
        typer.echo(warning, err=True)
    from data_prep.vae.train import train_autoencoder

    report = train_autoencoder(values)
    typer.echo(f"held-out PSNR {report['psnr']:.2f} dB after {report['num_steps']} steps")
