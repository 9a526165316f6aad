"""`megafusion train-tokenizer`."""

import typer

from megafusion.commands.arguments import ConfigFile, Overrides


def train_tokenizer(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train a tokenizer on captions and texts: a SentencePiece model, for preprocess and train.

    Example: megafusion train-tokenizer configs/tokenizer/emoji.yaml out=runs/tokenizer.model vocab_size=1000
    """
    from data_prep.tokenizer.config import TokenizerConfig
    from megafusion.config import load_config

    values = load_config(TokenizerConfig, config, overrides or [])
    from data_prep.tokenizer.train import train_tokenizer as run

    typer.echo(run(values))
