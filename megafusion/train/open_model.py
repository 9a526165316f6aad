"""Opening the model of a pipeline folder, a run or a checkpoint. Imports torch."""

from pathlib import Path
from typing import Literal

from megafusion.checkpoint.folder import latest_checkpoint, verify_checkpoint
from megafusion.checkpoint.reader import CheckpointWeights, fill_tensors
from megafusion.errors import UserError
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.images.codec import ImageCodec
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.train.build import make_pipeline
from megafusion.train.run_folder import load_run_config


def open_pipeline(path: Path) -> TransfusionPipeline:
    """Open a pipeline folder, a run folder (its pipeline, else its newest checkpoint), or a checkpoint."""
    if (path / "config.json").is_file():
        return TransfusionPipeline.from_pretrained(path)
    if (path / "pipeline").is_dir():
        return TransfusionPipeline.from_pretrained(path / "pipeline")
    if (path / "config.yaml").is_file():
        path = latest_checkpoint(path)
    if not path.name.startswith("step-"):
        raise UserError(f"{path}: neither a pipeline folder, a run folder nor a checkpoint (step-*)")
    return open_checkpoint(path, "ema")


def open_checkpoint(path: Path, kind: Literal["ema", "model"]) -> TransfusionPipeline:
    """Open a run's checkpoint, with its EMA weights or the raw ones."""
    config = load_run_config(path.parent.parent)
    tokenizer = Tokenizer.from_pretrained(config.data.tokenizer)
    codec = ImageCodec.from_pretrained(config.data.vae)
    pipeline = make_pipeline(config, tokenizer, codec)
    verify_checkpoint(path)
    fill_tensors(CheckpointWeights(path, kind), pipeline.model.weights())
    return pipeline
