"""`megafusion evaluate`."""

from pathlib import Path
from typing import Annotated, get_args

import typer

from megafusion.commands.arguments import Overrides, TrainedModel, check_trained_model
from megafusion.config import parse_config
from megafusion.errors import UserError
from megafusion.evaluate.config import EvaluateConfig, SuiteName
from megafusion.suggestions import nearest
from megafusion.yaml_values import apply_overrides, load_values


def evaluate(
    checkpoint: TrainedModel,
    overrides: Overrides = None,
    suite: Annotated[list[str] | None, typer.Option(help="What to measure; repeat for several.")] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for the results; a second call there measures what is missing.")
    ] = Path("evaluation"),
    config: Annotated[
        Path | None, typer.Option(help="YAML file of the keys, which KEY=VALUE overrides.", metavar="FILE")
    ] = None,
) -> None:
    """Measure a trained model: report.json, report.md and sheets of images.

    As one process or several (RANK and WORLD_SIZE of a launcher), which share nothing but the folder.

    Examples:

    megafusion evaluate runs/quickstart --suite perplexity texts=[held-out.txt]

    megafusion evaluate runs/styles --suite captions --suite images annotations=fold-0/captions.json
    judge=judge.safetensors
    """
    known = get_args(SuiteName)
    among = f"one of {', '.join(known)}; repeat it for several"
    if not suite:
        raise UserError(f"--suite: name {among}")
    if unknown := [name for name in suite if name not in known]:
        hint = nearest(unknown[0], known, 1)
        raise UserError(f"--suite: {unknown[0]} is unknown; did you mean {hint}? Name {among}")
    values = load_values(config, overrides or []) if config else apply_overrides({}, overrides or [])
    parsed = parse_config(EvaluateConfig, values, str(config or "evaluate"))
    parsed.check_suites(suite)
    check_trained_model(checkpoint)
    from megafusion.evaluate.run import evaluate as run

    if run(checkpoint, suite, parsed, out) is None:
        typer.echo(f"{out}: other processes have batches left; the last one writes the report")
    else:
        typer.echo((out / "report.md").read_text(), nl=False)
