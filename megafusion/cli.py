"""The `megafusion` command: composes the commands, and turns errors into messages and exit statuses."""

import errno
import os
import sys
from typing import Annotated

import typer

from megafusion import __version__
from megafusion.commands import checkpoint, data
from megafusion.commands.arguments import expand_paths
from megafusion.commands.data_prep import preprocess, report, train_tokenizer, train_vae
from megafusion.commands.evaluate import evaluate
from megafusion.commands.export import export
from megafusion.commands.generate import generate
from megafusion.commands.import_model import import_model
from megafusion.commands.keys import keys
from megafusion.commands.launch import launch
from megafusion.commands.plan import plan
from megafusion.commands.serve import serve
from megafusion.commands.status import status
from megafusion.commands.sweep import sweep
from megafusion.commands.train import listen_for_signals, train
from megafusion.errors import UserError, exit_on_user_error
from megafusion.processes import exit_on_stop_signals, ignore_write_errors

# Busy-waiting CPU threads slow a step down sevenfold when anything else runs on a core. torch reads this when
# it is imported, which no command has done yet.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Errors of a disk that refuses to be written, and of a path that cannot be: a file where a folder stands, ...
DISK_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
DISK_REFUSALS |= {errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train one transformer that writes text and draws images.\n\n"
    "The usual order: `preprocess`, `train`, `generate`. Configurations are YAML files in configs/; any key "
    "can be overridden after the file, as in `train.num_steps=50`.",
)
for command in (
    train_tokenizer,
    preprocess,
    train_vae,
    train,
    status,
    generate,
    serve,
    evaluate,
    export,
    report,
    plan,
    launch,
    sweep,
    keys,
):
    app.command()(expand_paths(command))
app.command("import")(expand_paths(import_model))
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(data.app, name="data")


def main() -> None:
    """Run the command line. A UserError ends it with one message and the error's exit status."""
    os.umask(os.umask(0o077) | 0o002)  # nothing that a run writes is writable by the world
    if sys.argv[1:2] == ["train"]:
        listen_for_signals()
    elif sys.argv[1:2] in (["preprocess"], ["train-vae"], ["evaluate"], ["sweep"]):
        exit_on_stop_signals()
    if sys.argv[1:2] in (["train"], ["preprocess"], ["train-vae"], ["evaluate"], ["sweep"]):
        ignore_write_errors()
    with exit_on_user_error():
        try:
            app()
        except OSError as error:
            if error.errno not in DISK_REFUSALS:
                raise
            where = error.filename2 or error.filename or "the disk"
            way_out = "make room, or choose another path"
            raise UserError(f"{where}: {error.strerror}; {way_out}") from error


def process() -> None:
    """Run `main` as a process of its own whose exit status holds.

    A trainer's C++ threads occasionally abort a process that exits Python's way, after all work is done; a
    server would take seconds to collect its modules.
    """
    try:
        main()
    except SystemExit as end:
        if sys.argv[1:2] in (["train"], ["serve"]) and isinstance(end.code, int):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code)
        raise


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """Options of the command itself."""


if __name__ == "__main__":
    process()
