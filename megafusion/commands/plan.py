"""`megafusion plan`."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from megafusion.commands.arguments import ConfigFile, Overrides


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="GPUs of the run.", min=1, max=1_000_000)] = 8,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100, b200, or a JSON file of ceilings.")] = "h100",
    ceilings: Annotated[
        Path | None, typer.Option(help="What benchmarks/ceilings.py --json measured on such a GPU.")
    ] = None,
    rows: Annotated[
        Literal["mixed", "text", "pairs", "whole"],
        typer.Option(help="What rows hold: captions with images and texts, one of them, or one whole text."),
    ] = "mixed",
    gpu_hour: Annotated[float | None, typer.Option(help="Dollars of a GPU-hour.", min=0)] = None,
    failures: Annotated[
        float | None, typer.Option(help="Failures of a GPU in a thousand hours; default: Llama 3's.", min=0)
    ] = None,
    restart: Annotated[
        float | None, typer.Option(help="Seconds from a failure to the next step.", min=0)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print plain values.")] = False,
) -> None:
    """Predict memory, speed and cost of a run on some GPUs, and recommend degrees of parallelism.

    Example: megafusion plan configs/7b.yaml --gpus 64 --gpu h100
    """
    from rich.console import Console

    from megafusion.plan.chip import load_chip, with_ceilings
    from megafusion.plan.goodput import FAILURES_PER_GPU_HOUR, RESTART_SECONDS
    from megafusion.plan.report import show
    from megafusion.plan.runs import plan_run
    from megafusion.train.from_data import load_training_config

    values = load_training_config(config, overrides or [])
    chip = load_chip(gpu)
    if ceilings:
        chip = with_ceilings(chip, ceilings)
    found = plan_run(
        values.job(gpus, rows),
        chip,
        num_steps=values.train.num_steps,
        gpu_hour=chip.gpu_hour if gpu_hour is None else gpu_hour,
        failures=FAILURES_PER_GPU_HOUR if failures is None else failures / 1000,
        restart=RESTART_SECONDS if restart is None else restart,
    )
    if as_json:
        typer.echo(json.dumps(found.describe(), indent=1))
    else:
        show(found, Console())
