"""Opening the model of a run or a checkpoint. Imports torch."""

from pathlib import Path
from typing import Literal

from megafusion.checkpoint.folder import checkpoint_at, training_flops, verify_checkpoint
from megafusion.checkpoint.lora import open_weights
from megafusion.checkpoint.reader import CheckpointWeights, fill_tensors, read_tensors
from megafusion.errors import UserError
from megafusion.generate.peft_folder import write_peft_folder
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.images.codec import ImageCodec
from megafusion.model.config import is_lora_weight
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.train.build import make_pipeline
from megafusion.train.config import RunConfig
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
    verify_checkpoint(path)
    pipeline = make_pipeline(config, tokenizer, codec, training_flops(path))
    fill_tensors(open_weights(path, kind, config.train.lora), pipeline.model.weights())
    return pipeline


def export_lora(config: RunConfig, checkpoint: Path, out: Path) -> None:
    """Write the averaged LoRA adapter of a run's checkpoint as PEFT reads it. UserError if it has none."""
    if not config.train.lora:
        raise UserError(f"{checkpoint}: of a run without train.lora, so there is no adapter; export --to hf")
    weights = CheckpointWeights(checkpoint, "ema")
    own = {name: shape for name, shape in weights.shapes().items() if is_lora_weight(name)}
    base = str(config.train.init_from) if config.train.init_from else None
    write_peft_folder(out, read_tensors(weights, own), config.train.lora, config.model.num_layers, base)
