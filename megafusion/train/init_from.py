"""Weights that a run starts from in place of random ones: `train.init_from`."""

from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megafusion.checkpoint.chunks import Chunks
from megafusion.checkpoint.folder import checkpoint_at
from megafusion.checkpoint.lora import open_weights
from megafusion.checkpoint.reader import TensorSource, describe_misfit
from megafusion.checkpoint.safetensors_reader import SafetensorsWeights, open_safetensors
from megafusion.config import parse_config
from megafusion.errors import UserError
from megafusion.generate.folder import read_pipeline_config
from megafusion.hub.config import model_keys, read_hub_config, sliding_window
from megafusion.hub.folder import tokenizer_files
from megafusion.hub.weights import open_hub_weights
from megafusion.model.config import ModelConfig
from megafusion.model.hub_names import EMBEDDING, HEAD, IMAGES
from megafusion.objective.alignment import ALIGNMENT
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.storage import file_sha256, read_json
from megafusion.train.config import RunConfig
from megafusion.train.parts import check_patterns, weight_shapes
from megafusion.train.run_folder import ENVIRONMENT, load_run_config

FIXED = {
    "num_heads": "num_heads",
    "num_kv_heads": "kv_heads",
    "head_dim": "head_size",
    "norm_eps": "norm_eps",
    "post_norm": "post_norm",
}
"""Model keys that decide what weights compute and show in no shape, with the attribute of each."""
CHANGEABLE = ("rope_theta", "rope_scaling", "image_rope", "image_attention", "image_sizes")
"""The same, where a change is part of a recipe: for longer rows or other images."""


class Origin(NamedTuple):
    """Weights to start from, with the model and the tokenizer that they belong to.

    tokenizers: files of the same tokenizer. checkpoint: whose files are to be verified. text_config: of the
    Hugging Face model that they began as. names: of the run's weights that the source has, or has rows of.
    whole: of those that it has all rows of.
    """

    source: TensorSource
    model: ModelConfig
    tokenizers: list[Path]
    checkpoint: Path | None = None
    text_config: dict[str, Any] | None = None
    names: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()


def open_origin(config: RunConfig) -> Origin:
    """Open `train.init_from`, reading headers alone. UserError if it is none of the supported folders."""
    assert config.train.init_from is not None
    path, raw = config.train.init_from, config.train.init_weights == "raw"
    if checkpoint := checkpoint_at(path):
        path, run = checkpoint, checkpoint.parent.parent
        began = load_run_config(run)
        source = open_weights(path, "model" if raw else "ema", began.train.lora)
        tokenizer = Tokenizer.from_pretrained(began.data.tokenizer).path
        origin = Origin(source, began.model, [tokenizer], path, text_config_of(run))
    elif not (path / "config.json").is_file():
        raise UserError(
            f"train.init_from {path}: neither a pipeline folder, a run folder, a checkpoint (step-*) nor a "
            "Hugging Face folder"
        )
    elif raw:
        raise UserError(
            f"train.init_weights raw: {path} has one kind of weights; leave it out, or name a run"
        )
    elif "format" in read_json(path / "config.json"):
        parts = {name: [tensor] for name, tensor in open_safetensors(path).items()}
        origin = Origin(
            SafetensorsWeights(path, parts),
            read_pipeline_config(path).model,
            tokenizer_files(path),
            text_config=text_config_of(path.parent),
        )
    else:
        origin = _open_hub(path, config)
    if origin.model.tie_embeddings and not config.model.tie_embeddings:
        origin = origin._replace(source=CopiedWeights(origin.source, {HEAD: EMBEDDING}))
    wanted = weight_shapes(config)
    if origin.model.modality_weights == "none":  # then those of image patches start as the texts'
        copies = {name: name.replace(f".{IMAGES}", ".") for name in wanted if f".{IMAGES}" in name}
        origin = origin._replace(source=CopiedWeights(origin.source, copies))
    stored = origin.source.shapes()
    fitting = frozenset(name for name, here in wanted.items() if _fits(name, stored.get(name), here))
    whole = frozenset(name for name in fitting if stored[name] == wanted[name])
    return origin._replace(names=fitting, whole=whole)


def _open_hub(path: Path, config: RunConfig) -> Origin:
    values = read_hub_config(path)
    file = path / "config.json"
    window, length = sliding_window(values), config.data.sequence_length
    if window is not None and window < length:
        raise UserError(
            f"{file}: sliding_window {window} is less than data.sequence_length {length}, and windows are "
            f"not supported; set data.sequence_length to at most {window}"
        )
    # Of images it says nothing: they are this run's.
    keys = config.model.model_dump(mode="json") | model_keys(values, file)
    model = parse_config(ModelConfig, keys, str(file))
    source = open_hub_weights(path, weight_shapes(config), model.tie_embeddings)
    if (shape := source.shapes().get(EMBEDDING)) and shape[0] != values["vocab_size"]:
        raise UserError(f"{file}: vocab_size {values['vocab_size']}, but the embedding has {shape[0]} rows")
    return Origin(source, model, tokenizer_files(path), text_config=values)


class CopiedWeights:
    """A TensorSource with more weights, which are copies of others. copies: names of those by theirs."""

    def __init__(self, source: TensorSource, copies: dict[str, str]):
        self._source, self._copies = source, copies

    def __str__(self) -> str:
        return str(self._source)

    def shapes(self) -> dict[str, torch.Size]:
        shapes = self._source.shapes()
        return shapes | {name: shapes[own] for name, own in self._copies.items() if own in shapes}

    def read(self, chunks: dict[str, Chunks]) -> None:
        self._source.read({name: part for name, part in chunks.items() if name not in self._copies})
        if copied := {own: chunks[name] for name, own in self._copies.items() if name in chunks}:
            self._source.read(copied)


def check_origin(origin: Origin, config: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Check an origin against the run; returns the run folder's record of its start.

    Raises UserError with every tensor that does not fit.
    """
    path = config.train.init_from
    if tokenizer.hash not in map(file_sha256, origin.tokenizers):
        names = " or ".join(map(str, origin.tokenizers)) or "a copy of the right one"
        raise UserError(
            f"data.tokenizer {tokenizer.path}: not the tokenizer of train.init_from, so its ids are other "
            f"tokens; set it to {names}"
        )
    was, now = origin.model, config.model
    fixed = {key: (getattr(was, name), getattr(now, name)) for key, name in FIXED.items()}
    if differing := [f"model.{key} {b} instead of {a}" for key, (a, b) in fixed.items() if a != b]:
        raise UserError(f"{', '.join(differing)}, which {path} was trained with; use its model keys")
    wanted, stored = weight_shapes(config), origin.source.shapes()
    if (rows := stored.get(EMBEDDING, [tokenizer.num_text_ids])[0]) < tokenizer.num_text_ids:
        raise UserError(
            f"train.init_from {path}: {rows} token ids, but its tokenizer {tokenizer.path} has "
            f"{tokenizer.num_text_ids}; give the tokenizer that it was trained with"
        )
    patterns = config.train.init_new
    check_patterns("train.init_new", patterns, list(wanted))
    patterns = *patterns, f"{ALIGNMENT}*"  # of which no model is published
    new, misfits = [], Counter[str]()
    for name in sorted(wanted.keys() | stored.keys()):
        there, here = stored.get(name), wanted.get(name)
        misfit = describe_misfit(name, there, here)
        # Of token ids only the last rows may be new: no pattern means all of them.
        may_be_new = name not in (EMBEDDING, HEAD) or name in origin.names
        if misfit and may_be_new and any(fnmatchcase(name, pattern) for pattern in patterns):
            start = f" from row {there[0]}" if name in origin.names and there else ""
            new += [name + start] if here else []
        elif misfit:
            has_more_rows = name in (EMBEDDING, HEAD) and there and here and there[0] > here[0]
            way_out = f"; set model.vocab_size: {there[0]}" if has_more_rows and there else ""
            misfits[_of_all_blocks(misfit + way_out)] += 1
    if misfits:
        lines = [f"  {text}" + (f" ({count} blocks)" if count > 1 else "") for text, count in misfits.items()]
        raise UserError(
            f"train.init_from {path}: does not fit the model; name in train.init_new what may start at "
            "random, weights or their last rows:\n" + "\n".join(lines)
        )
    recipe = {f"model.{key}": [str(getattr(m, key)) for m in (was, now)] for key in CHANGEABLE}
    changed = {key: values for key, values in recipe.items() if values[0] != values[1]}
    return {"path": str(origin.source), "new": new, "changed": changed, "text_config": origin.text_config}


def describe_start(record: dict[str, Any]) -> str:
    """A line about what a run starts from."""
    changed = "".join(f"; {key} {now} instead of {was}" for key, (was, now) in record["changed"].items())
    new = f"; at random {', '.join(record['new'])}" if record["new"] else ""
    return f"starts from {record['path']}{changed}{new}"


def text_config_of(run: Path) -> dict[str, Any] | None:
    """config.json of the Hugging Face model that a run, or the first before it, began as, if any."""
    path = run / ENVIRONMENT
    return (read_json(path).get("init_from") or {}).get("text_config") if path.is_file() else None


def _fits(name: str, there: torch.Size | None, here: torch.Size) -> bool:
    """Whether a tensor is the model's, or its first rows where rows are token ids."""
    has_rows = there is not None and there[1:] == here[1:] and there[0] < here[0]
    return there == here or (has_rows and name in (EMBEDDING, HEAD))


def _of_all_blocks(text: str) -> str:
    head, *rest = text.split(".", 2)
    return ".".join([head, "*", rest[1]]) if head == "blocks" else text
