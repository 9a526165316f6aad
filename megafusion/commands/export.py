"""`megafusion export`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from megafusion.commands.arguments import TrainedModel, check_trained_model


def export(
    model: TrainedModel,
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[
        Literal["hf", "peft", "pipeline"],
        typer.Option(
            help="Format: hf, the text path, which transformers loads; peft, the LoRA adapter of a run or "
            "checkpoint; pipeline, which generate and from_pretrained load."
        ),
    ],
    merge: Annotated[
        list[Path] | None,
        typer.Option(help="LoRA adapter (PEFT folder, or run with train.lora) to merge into the weights."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Type of the weights; default: that of the text model it began as, else float32."),
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="Licence for the model card, such as apache-2.0.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Export a model: its text path for transformers, its LoRA adapter for PEFT, or all of it as a pipeline.

    Example: megafusion export runs/quickstart exported-text --to hf --license apache-2.0
    """
    from megafusion.errors import UserError
    from megafusion.storage import refuse_existing

    refuse_existing(out, overwrite)
    if to != "hf" and (dtype or license):
        raise UserError(f"--dtype and --license are of --to hf; leave them out with --to {to}")
    if to == "peft" and merge:
        raise UserError("--merge is of --to hf and --to pipeline; leave it out with --to peft")
    check_trained_model(model)
    from megafusion.train.export import export_adapter, export_pipeline, export_text

    adapters = list(merge or ())
    if to == "hf":
        export_text(model, out, dtype, license, adapters)
        typer.echo(f"{out}: AutoModelForCausalLM.from_pretrained({str(out)!r}) loads it")
        return
    if to == "pipeline":
        export_pipeline(model, out, adapters)
        typer.echo(f"{out}: a pipeline folder; megafusion generate {out} --prompt TEXT")
        return
    export_adapter(model, out)
    typer.echo(f"{out}: PeftModel.from_pretrained(model, {str(out)!r}) loads it")
