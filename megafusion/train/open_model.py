"""Opening the model of a run or a checkpoint. Imports torch."""

from pathlib import Path
from typing import Literal

from megafusion.checkpoint.folder import checkpoint_at, verify_checkpoint
from megafusion.checkpoint.lora import open_weights
from megafusion.checkpoint.reader import fill_tensors
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.images.codec import ImageCodec
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.train.build import make_pipeline
from megafusion.train.run_folder import load_run_config


def open_run(path: Path) -> TransfusionPipeline | None:
    """Open the newest checkpoint of a run folder, or one checkpoint; None for any other path."""
    checkpoint = checkpoint_at(path)
    return open_checkpoint(checkpoint, "ema") if checkpoint else None


def open_checkpoint(path: Path, kind: Literal["ema", "model"]) -> TransfusionPipeline:
    """Open a run's checkpoint, with its EMA weights or the raw ones."""
    config = load_run_config(path.parent.parent)
    tokenizer = Tokenizer.from_pretrained(config.data.tokenizer)
    codec = ImageCodec.from_pretrained(config.data.vae)
    pipeline = make_pipeline(config, tokenizer, codec)
    verify_checkpoint(path)
    fill_tensors(open_weights(path, kind, config.train.lora), pipeline.model.weights())
    return pipeline
