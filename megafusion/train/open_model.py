"""Opening the model of a pipeline folder, a run or a checkpoint. Imports torch."""

from pathlib import Path
from typing import Literal

from megafusion.checkpoint.folder import newest_checkpoint
from megafusion.checkpoint.reader import load_whole
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
        path = newest_checkpoint(path)
    if not path.name.startswith("step-"):
        raise UserError(f"{path}: neither a pipeline folder, a run folder nor a checkpoint (step-*)")
    return open_checkpoint(path, "ema")


def open_checkpoint(path: Path, kind: Literal["ema", "model"]) -> TransfusionPipeline:
    """Open a run's checkpoint, with its EMA weights or the raw ones."""
    config = load_run_config(path.parent.parent)
    tokenizer, codec = Tokenizer(config.data.tokenizer), ImageCodec.from_pretrained(config.data.vae)
    pipeline = make_pipeline(config, tokenizer, codec)
    shapes = {name: p.shape for name, p in pipeline.model.named_parameters()}
    pipeline.model.load_state_dict(load_whole(path, shapes, kind))
    return pipeline
