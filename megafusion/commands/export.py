"""`megafusion export`."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def export(
    model: Annotated[Path, typer.Argument(help="Pipeline folder, run folder, or one checkpoint of a run.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[Literal["hf"], typer.Option(help="Format: hf, a folder that transformers loads.")],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Type of the weights; default: that of the text model it began as, else float32."),
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="Licence for the model card, such as apache-2.0.")
    ] = None,
) -> None:
    """Export a model's text path: config.json, safetensors, tokenizer, generation_config.json, README.md.

    Example: megafusion export runs/quickstart exported-text --to hf --license apache-2.0
    """
    from megafusion.train.export import export_text

    export_text(model, out, dtype, license)
    typer.echo(f"{out}: AutoModelForCausalLM.from_pretrained({str(out)!r}) loads it")
