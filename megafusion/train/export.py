"""`megafusion export`: a model's text path as transformers loads it, with a card from its run folder."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from huggingface_hub import ModelCard, ModelCardData

from megafusion.checkpoint.folder import checkpoint_at, step_of
from megafusion.data.manifest import load_manifest
from megafusion.errors import UserError
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.hub.export import Dtype, export_text_model
from megafusion.sequence.sentencepiece_tokenizer import SentencePieceTokenizer
from megafusion.storage import read_json
from megafusion.telemetry.metrics_file import METRICS, read_metrics
from megafusion.train.config import RunConfig
from megafusion.train.init_from import text_config_of
from megafusion.train.open_model import export_lora
from megafusion.train.run_folder import ENVIRONMENT, latest_config, load_run_config


def export_adapter(model: Path, out: Path) -> None:
    """Export the LoRA adapter of a run or a checkpoint; see `megafusion export`."""
    if not (checkpoint := checkpoint_at(model)):
        raise UserError(f"{model}: neither a run folder nor a checkpoint (step-*), which have LoRA adapters")
    export_lora(load_run_config(checkpoint.parent.parent), checkpoint, out)


def export_pipeline(model: Path, out: Path, adapters: Sequence[Path]) -> None:
    """Export a model as a pipeline folder, LoRA adapters merged; see `megafusion export`."""
    _open(model, adapters).save_pretrained(out)


def _open(model: Path, adapters: Sequence[Path]) -> TransfusionPipeline:
    pipeline = TransfusionPipeline.from_pretrained(model)
    for adapter in adapters:
        pipeline.load_lora_weights(adapter)
    return pipeline


def export_text(
    model: Path, out: Path, dtype: Dtype | None, license: str | None, adapters: Sequence[Path] = ()
) -> None:
    """Export the text path of a pipeline folder, a run or a checkpoint; see `megafusion export`."""
    here = model.absolute()
    run = next((p for p in (here, here.parent, here.parent.parent) if (p / "config.yaml").is_file()), None)
    pipeline = _open(model, adapters)
    base = (text_config_of(run) if run else None) or {}
    base.setdefault("max_position_embeddings", pipeline.config.sequence_length)
    if base["max_position_embeddings"] is None:
        raise UserError(
            f"{model}: a pipeline of version 0.1, without its number of positions; export its run"
        )
    is_qwen = pipeline.config.model.attention_bias or pipeline.config.model.qk_norm
    if is_qwen and isinstance(pipeline.tokenizer, SentencePieceTokenizer):
        raise UserError(
            f"{model}: with model.attention_bias or model.qk_norm it is a Qwen model to transformers, which "
            "reads no SentencePiece tokenizer for those; export a model with another tokenizer"
        )
    dtype = dtype or base.get("dtype") or base.get("torch_dtype") or "float32"
    if dtype not in get_args(Dtype):
        raise UserError(f"the text model that {model} began as has weights of {dtype}; give --dtype")
    step = step_of(checkpoint) if (checkpoint := checkpoint_at(model)) else None
    export_text_model(pipeline, out, base, model_card(_title(out, run), run, license, step), dtype)


def _title(out: Path, run: Path | None) -> str:
    return f"Text path of {run.name}" if run else out.absolute().name


def model_card(name: str, run: Path | None, license: str | None, step: int | None = None) -> str:
    """README.md: what the model is, its licence, and how a run trained it, on what, with which figures.

    step: of the weights, where they are not the run's last.
    """
    data = ModelCardData(license=license, library_name="transformers", pipeline_tag="text-generation")
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        "The text path of a Transfusion model (arXiv 2408.11039), trained with MegaFusion. The weights that "
        "read and draw images are not in it.",
        f"Licence: {license or 'not stated; those of its data and of its origin apply'}.",
    ]
    return "\n\n".join(lines + (_facts(latest_config(run), run, step) if run else [])) + "\n"


def _facts(config: RunConfig, run: Path, step: int | None) -> list[str]:
    train, optimizer, length = config.train, config.optimizer, config.data.sequence_length
    files = (run / ENVIRONMENT, run / "report.json")
    environment, report = (read_json(path) if path.is_file() else {} for path in files)
    metrics = read_metrics(run) if (run / METRICS).is_file() else []
    last: dict = metrics[-1] if metrics else {}
    if step is not None and step < last.get("step", 0):
        last, report = next((line for line in reversed(metrics) if line["step"] <= step), {}), {}
    training = {
        "began as": _origin(train.init_from) if train.init_from else "random weights",
        "steps": f"{last.get('step', 0) if step is None else step} of {train.num_steps}",
        "batch": f"{train.global_batch_size} rows of {length} positions",
        "learning rate": f"{optimizer.learning_rate:g}, {optimizer.num_warmup_steps} warm-up steps, "
        f"{optimizer.schedule}",
        "trained": f"LoRA, {train.lora.model_dump(mode='json')}" if train.lora else "",
        "frozen": ", ".join(train.freeze),
        "precision": train.precision,
        "seed": config.seed,
        "devices": f"{environment.get('world_size')} x {environment.get('device')}",
        "software": ", ".join(f"{name} {number}" for name, number in environment.get("packages", {}).items()),
    }
    training = {key: value for key, value in training.items() if value != ""}
    figures: dict[str, Any] = {key: last[key] for key in ("text_loss", "image_loss") if key in last}
    figures = dict(_flat(figures | report))
    manifests = {name: load_manifest(source.path) for name, source in config.data.sources.items()}
    weights = {name: source.weight for name, source in config.data.sources.items()}
    sources = {
        name: f"{found.kind}, weight {weights[name]:g}: {found.num_documents:,} documents, "
        f"{found.num_tokens:,} tokens, {found.num_images:,} images"
        for name, found in manifests.items()
    }
    made_from = [text for name, found in manifests.items() for text in _provenance(name, found.provenance)]
    parts = ["## Training", _table(training), "## Data", _table(sources), *made_from]
    return [*parts, *(["## Figures", _table(figures)] if figures else [])]


def _origin(path: Path) -> str:
    readme = path / "README.md"
    license = ModelCard.load(readme).data.license if readme.is_file() else None
    return f"{path} (licence {license})" if license else str(path)


def _provenance(source: str, provenance: dict[str, str]) -> Iterator[str]:
    """The inputs of a source's shards: a table of what is short, and blocks of what has lines."""
    if short := {key: value for key, value in provenance.items() if "\n" not in value.strip()}:
        yield f"Made from, `{source}`:"
        yield _table(short)
    for key, value in provenance.items():
        if key not in short:
            yield f"`{source}`, {key}:\n\n```\n{value.strip()}\n```"


def _flat(values: dict[str, Any], parent: str = "") -> Iterator[tuple[str, str]]:
    """Figures and those within figures, by dotted name, to four digits."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{parent}{key}.")
        else:
            number = f"{value:.4g}" if isinstance(value, float) and abs(value) < 1e4 else None
            yield f"{parent}{key}", number or (f"{value:,.0f}" if isinstance(value, float) else str(value))


def _table(rows: dict[str, Any]) -> str:
    texts = {key: " ".join(str(value).split()).replace("|", r"\|") for key, value in rows.items()}
    cells = [f"| {key} | {text} |" for key, text in texts.items()]
    return "\n".join(["| | |", "|---|---|", *cells])
