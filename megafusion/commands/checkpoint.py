"""`megafusion checkpoint`: show, verify and export a run's checkpoints."""

import json
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Annotated

import typer

from megafusion.checkpoint.folder import (
    KINDS,
    MANIFEST,
    DamagedCheckpoint,
    all_checkpoints,
    checkpoint_at,
    is_checkpoint,
    read_manifest,
    step_of,
    verify_checkpoint,
)
from megafusion.checkpoint.tensor_list import ITEM_BYTES, read_shapes_and_types
from megafusion.commands.arguments import expand_paths
from megafusion.errors import UserError
from megafusion.storage import refuse_existing

app = typer.Typer(
    no_args_is_help=True,
    help="Show a run's checkpoints, verify them, or export one as a pipeline folder.\n\n"
    "Example: megafusion checkpoint show runs/quickstart",
)

NEITHER = "neither a run folder nor a checkpoint (RUN/checkpoints/step-*)"
RunOrCheckpoint = Annotated[
    Path, typer.Argument(help="Run folder, or one of its checkpoints/step-*.", metavar="RUN_OR_CHECKPOINT")
]


@app.command()
@expand_paths
def show(path: RunOrCheckpoint) -> None:
    """List a run's checkpoints (step, bytes, complete or not, what saved it), or describe one.

    Example: megafusion checkpoint show runs/quickstart
    """
    if is_checkpoint(path):
        print("\n".join(_describe(path)))
        return
    rows = [("step", "bytes", "complete", "saved by")]
    for checkpoint in _checkpoints(path):
        step = str(step_of(checkpoint))
        if not (checkpoint / MANIFEST).is_file():
            rows.append((step, "", "no", ""))
            continue
        try:
            files = read_manifest(checkpoint)
        except DamagedCheckpoint:
            rows.append((step, "", "damaged", ""))
            continue
        paths = {checkpoint / name: entry["bytes"] for name, entry in files.items()}
        is_whole = all(path.is_file() and path.stat().st_size == size for path, size in paths.items())
        state = "yes" if is_whole else "damaged"
        rows.append((step, f"{sum(paths.values()):,}", state, _topology(_state(checkpoint))))
    print("\n".join(_table(rows)))


@app.command()
@expand_paths
def verify(path: RunOrCheckpoint) -> None:
    """Hash every file of a checkpoint, or of all of a run's; each corrupt one is named, with exit status 2.

    Example: megafusion checkpoint verify runs/quickstart/checkpoints/step-00000900
    """
    bad = []
    for checkpoint in [path] if is_checkpoint(path) else _checkpoints(path):
        try:
            verify_checkpoint(checkpoint)
        except UserError as error:
            bad.append(str(error))
        else:
            print(f"{checkpoint}: {len(read_manifest(checkpoint))} files intact")
    if bad:
        raise UserError("\n".join(bad))


@app.command()
@expand_paths
def export(
    path: RunOrCheckpoint,
    out: Annotated[Path, typer.Argument(help="Pipeline folder to write, for generate and from_pretrained.")],
    raw_weights: Annotated[
        bool, typer.Option("--weights", help="Export the raw weights, not the EMA weights.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Export a checkpoint, or a run's newest complete one, as safetensors that TransfusionPipeline loads.

    Example: megafusion checkpoint export runs/quickstart/checkpoints/step-00000600 exported
    """
    from megafusion.train.open_model import open_checkpoint

    if not (checkpoint := checkpoint_at(path)):
        raise UserError(f"{path}: {NEITHER}")
    refuse_existing(out, overwrite)
    open_checkpoint(checkpoint, "model" if raw_weights else "ema").save_pretrained(out)
    print(f"{out}: a pipeline folder; megafusion generate {out} --prompt TEXT")


def _checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints, complete or not, oldest first."""
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: {NEITHER}")
    if not (found := all_checkpoints(run / "checkpoints")):
        raise UserError(f"{run}: the run has no checkpoint yet; train it further")
    return found


def _state(checkpoint: Path) -> dict:
    """Step and topology from a checkpoint's state.json. UserError if it cannot be read."""
    path = checkpoint / "state.json"
    try:
        state = json.loads(path.read_text())
        return {"step": int(state["step"]), "topology": dict(state.get("topology", {}))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); run megafusion checkpoint verify {checkpoint}"
        ) from error


def _topology(state: dict) -> str:
    """The topology in words, without the degrees that are 1."""
    shown = {
        k: v for k, v in state["topology"].items() if k in ("world_size", "zero_stage") or v not in (1, False)
    }
    return ", ".join(name if value is True else f"{name} {value}" for name, value in shown.items())


def _describe(checkpoint: Path) -> list[str]:
    files, state = read_manifest(checkpoint), _state(checkpoint)
    tensors = read_shapes_and_types(checkpoint)
    rows = [("step", f"{state['step']:,}", ""), ("saved by", _topology(state), "")]
    for kind in KINDS:
        own = [(prod(shape), of) for name, (shape, of) in tensors.items() if name.partition(".")[0] == kind]
        num_bytes = sum(size * ITEM_BYTES[of] for size, of in own)
        rows.append((kind, f"{sum(size for size, _ in own):,} parameters", f"{num_bytes:,} bytes"))
    rows.append(("files", f"{len(files):,} files", f"{sum(e['bytes'] for e in files.values()):,} bytes"))
    return _table(rows)


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as text in aligned columns, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.rjust(width) if text[:1].isdigit() and number else text.ljust(width)
            for number, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
