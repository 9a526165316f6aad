"""The `megafusion` command."""

import errno
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from megafusion import __version__
from megafusion.config import load_config
from megafusion.errors import UserError
from megafusion.resilience.exit_status import ExitStatus
from megafusion.resilience.signals import StopSignals

# Threads of a CPU that wait for one another by spinning slow a step sevenfold as soon as anything else runs
# on a core; read when torch is loaded, which no command does before this line.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# What a disk answers when it will not take more.
DISK_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}

stop_signals = StopSignals()

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train one transformer that writes text and draws images.\n\n"
    "A typical way through: `preprocess`, `train`, `generate`. Configurations are YAML files in configs/; "
    "any key can be overridden behind the file, as in `train.num_steps=50`.",
)

ConfigFile = Annotated[Path, typer.Argument(help="YAML file; examples are in configs/.", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Values that replace the file's, as dotted.key=value.", metavar="[KEY=VALUE]..."),
]


def main() -> None:
    """Run the command line; what the user can fix ends with one message and exit status 2 (or 1)."""
    os.umask(os.umask(0o077) | 0o002)  # nothing that a run writes is writable by the world
    if sys.argv[1:2] == ["train"]:
        stop_signals.listen()  # before torch is loaded, which takes seconds
        if (stopped := os.environ.get("MEGAFUSION_STOPPED")) and Path(stopped).is_file():
            sys.exit(ExitStatus.RETRY)  # local.sh or node.sh was signalled before this process listened
    try:
        app()
    except UserError as error:
        if error.on_every_rank and os.environ.get("RANK", "0") != "0":
            time.sleep(10)  # a launcher kills rank 0, which has the message, as soon as another rank ends
        else:
            typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_status or ExitStatus.REFUSED)
    except OSError as error:
        if error.errno not in DISK_REFUSALS:
            raise
        where = error.filename or "the disk"
        typer.echo(f"error: {where}: {error.strerror}; make room, or choose another place", err=True)
        sys.exit(ExitStatus.REFUSED)


def process() -> None:
    """`main` as a process of its own, whose exit status holds.

    A trainer's threads in C++ now and then abort a process that ends in Python's way, after all is done.
    """
    try:
        main()
    except SystemExit as end:
        if sys.argv[1:2] == ["train"] and isinstance(end.code, int):
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


@app.command()
def preprocess(
    config: ConfigFile,
    overrides: Overrides = None,
    shard_range: Annotated[
        str | None,
        typer.Option(
            help="Make every N-th shard from the I-th on, I from 0: one of N tasks side by side, which share "
            "the output folder. The one that ends last writes the manifest.",
            metavar="I/N",
        ),
    ] = None,
) -> None:
    """Turn pictures, captions and text into shards: image latents, token ids, metadata, a manifest.

    Starting the same command again goes on where it was stopped, whatever stopped it.

    Example: megafusion preprocess configs/preprocess/quickstart.yaml out=data/mine num_workers=2
    """
    from data_prep.config import PreprocessConfig
    from data_prep.preprocess import parse_range
    from data_prep.preprocess import preprocess as run

    values = load_config(PreprocessConfig, config, overrides or [])
    run(values, parse_range(shard_range) if shard_range else None)


@app.command()
def train_vae(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train the autoencoder that turns pictures into latents (a diffusers AutoencoderKL folder).

    Example: megafusion train-vae configs/vae/emoji.yaml out=runs/vae
    """
    from data_prep.vae.train import AutoencoderConfig, train_autoencoder

    report = train_autoencoder(load_config(AutoencoderConfig, config, overrides or []))
    typer.echo(f"held-out PSNR {report['psnr']:.2f} dB after {report['num_steps']} steps")


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    stop_after: Annotated[
        int | None,
        typer.Option(help="End after this step of the run, with a checkpoint; resume later.", min=1),
    ] = None,
) -> None:
    """Train a model, or go on with the run that stands in the output folder.

    Ctrl-C, SIGTERM or SIGUSR1 to any process ends all after the step, with a checkpoint and exit status 75;
    so does a hang or a lost process, without a new checkpoint: start it again to go on.

    Example: megafusion train configs/quickstart.yaml train.num_steps=50 out=runs/try

    On 8 GPUs: deepspeed --num_gpus 8 --no_local_rank --module megafusion.cli train CONFIG parallel.tensor=4
    """
    from megafusion.checkpoint.folder import newest_step
    from megafusion.resilience.attempts import refuse_crash_loop
    from megafusion.resilience.lenient_streams import ignore_write_errors
    from megafusion.train.config import RunConfig

    ignore_write_errors()
    try:
        values = load_config(RunConfig, config, overrides or [])
    except UserError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        from megafusion.engine.process_group import start_process_group
        from megafusion.parallel.errors import raise_on_all_ranks

        start_process_group()
        with raise_on_all_ranks():  # as the other ranks' first collective
            raise error
    # Before torch is loaded, because a process that dies as it loads is a crashed attempt too.
    refuse_crash_loop(values.out, newest_step(values.out), values.resilience.max_crashes)
    from megafusion.train.loop import train as run

    if run(values, stop_after, stop_signals) == "preempted":
        raise typer.Exit(ExitStatus.RETRY)


@app.command()
def status(
    run_folder: Annotated[Path, typer.Argument(help="Folder of a run, training or ended.", metavar="RUN")],
) -> None:
    """Show a run on one screen: progress, losses, speed, last checkpoint, what was left out, restarts.

    Example: megafusion status runs/quickstart
    """
    from megafusion.telemetry.status import show_status

    show_status(run_folder)


@app.command()
def generate(
    checkpoint: Annotated[
        Path, typer.Argument(help="Pipeline folder, run folder, or one checkpoint of a run.")
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to draw; repeat for several prompts.", metavar="TEXT")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="Picture to describe; repeat for several.", metavar="PATH")
    ] = None,
    interleave: Annotated[
        list[str] | None,
        typer.Option(
            help="One prompt of texts and pictures in order: each is a text, or @PATH for a picture. "
            "The model answers with text or a picture as it likes.",
            metavar="PART",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures and captions.txt.")] = Path("generated"),
    seed: Annotated[int, typer.Option(help="Seed of the noise; the n-th prompt uses SEED + n.", min=0)] = 0,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; 1 turns it off.", min=0)
    ] = None,
    num_inference_steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=1)] = None,
    sampler: Annotated[str | None, typer.Option(help="ddim or dpm++.")] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Height and width in pixels of drawn pictures, one of those that the model was made for; "
            "it chooses itself by default.",
            metavar="HxW",
        ),
    ] = None,
) -> None:
    """Draw prompts, describe pictures, or continue a mixture of both.

    Examples:

    megafusion generate runs/quickstart --prompt "red apple, 3d style" --out apples

    megafusion generate runs/quickstart --image apples/0-red-apple-3d-style.png

    megafusion generate runs/quickstart --interleave "pizza, 3d style"
    """
    from megafusion.commands.generate import GenerateRequest, run

    overrides = {
        "guidance_scale": guidance_scale,
        "num_inference_steps": num_inference_steps,
        "sampler": sampler,
    }
    run(
        checkpoint,
        GenerateRequest(prompt or [], image or [], interleave or [], seed, size),
        out,
        {key: value for key, value in overrides.items() if value is not None},
    )


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(help="Folder of a finished run.", metavar="RUN")],
    pictures: Annotated[Path, typer.Option(help="Tar of the pictures that the run was trained on.")] = Path(
        "data_prep/emoji/emoji-000000.tar"
    ),
    classifier: Annotated[Path, typer.Option(help="Weights of the classifier of those pictures.")] = Path(
        "data_prep/emoji/classifier.safetensors"
    ),
    seconds_before: Annotated[
        float, typer.Option(help="Seconds from the first command to this one, for the total.", min=0)
    ] = 0.0,
) -> None:
    """Measure a quickstart run and show it: samples.png, captions.txt, losses.png, report.json.

    Example: megafusion report runs/quickstart
    """
    from data_prep.emoji.report import write_report

    report = write_report(run_folder, pictures, classifier, seconds_before)
    for name, value in report.items():
        typer.echo(f"{name}: {value}")
    typer.echo(f"look at {run_folder / 'samples.png'}, captions.txt and losses.png beside it")


@app.command()
def launch(
    config: ConfigFile,
    overrides: Overrides = None,
    site: Annotated[
        str, typer.Option(help="Cluster: a name in launchers/sites/, or a file like the ones there.")
    ] = ...,
    nodes: Annotated[int, typer.Option(help="Nodes of the job.", min=1)] = 1,
    time_limit: Annotated[
        str | None, typer.Option("--time", help="Time limit, as sbatch takes it; else the site's.")
    ] = None,
    launcher: Annotated[
        str | None, typer.Option(help="What starts the ranks: srun or deepspeed; else the site's.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the job script, submit nothing.")
    ] = False,
) -> None:
    """Submit a run to SLURM: its job script and frozen configuration go into the run folder.

    The job goes back into the queue by itself until the run is finished. Submitted again, with other --nodes,
    a run goes on in the new job once the old one has ended.

    Example: megafusion launch configs/7b.yaml parallel.tensor=8 --site example --nodes 16 --dry-run
    """
    from megafusion.launch.submit import launch as run

    typer.echo(run(config, overrides or [], site, nodes, time_limit, launcher, dry_run))


@app.command()
def keys(
    command: Annotated[
        Literal["train", "preprocess", "train-vae"], typer.Argument(help="Whose configuration.")
    ],
    under: Annotated[str, typer.Argument(help="Beginning of the keys to list: data., say.")] = "",
) -> None:
    """List the keys of a configuration: the default of each, or that it is required, and what it is.

    Example: megafusion keys train optimizer.
    """
    from megafusion.config import keys_of

    if command == "train":
        from megafusion.train.config import RunConfig as Chosen
    elif command == "preprocess":
        from data_prep.config import PreprocessConfig as Chosen
    else:
        from data_prep.vae.train import AutoencoderConfig as Chosen
    found = [key for key in keys_of(Chosen) if key.path.startswith(under)]
    if not found:
        raise UserError(f"no key of {command} begins with {under!r}; leave it out to list all")
    for key in found:
        choices = f" of {', '.join(map(str, key.choices))}" if key.choices else ""
        typer.echo(f"{key.path}: {key.default}{choices}\n    {key.about}")


checkpoint_app = typer.Typer(
    no_args_is_help=True,
    help="Look at a run's checkpoints, check them, or turn one into a pipeline folder.\n\n"
    "Example: megafusion checkpoint show runs/quickstart",
)
app.add_typer(checkpoint_app, name="checkpoint")

RunOrCheckpoint = Annotated[
    Path, typer.Argument(help="Run folder, or one of its checkpoints/step-*.", metavar="RUN_OR_CHECKPOINT")
]


@checkpoint_app.command("show")
def checkpoint_show(path: RunOrCheckpoint) -> None:
    """List a run's checkpoints (step, bytes, complete or not, what saved it), or describe one.

    Example: megafusion checkpoint show runs/quickstart
    """
    from megafusion.commands.checkpoint import show

    show(path)


@checkpoint_app.command("verify")
def checkpoint_verify(path: RunOrCheckpoint) -> None:
    """Hash every file of a checkpoint, or of all of a run's; each bad one is named, with exit status 2.

    Example: megafusion checkpoint verify runs/quickstart/checkpoints/step-00000900
    """
    from megafusion.commands.checkpoint import verify

    verify(path)


@checkpoint_app.command("export")
def checkpoint_export(
    path: RunOrCheckpoint,
    out: Annotated[Path, typer.Argument(help="Pipeline folder to write, for generate and from_pretrained.")],
    weights: Annotated[
        bool, typer.Option("--weights", help="Take the raw weights, not their moving average.")
    ] = False,
) -> None:
    """Write the model of a checkpoint, or of a run's newest, as safetensors that TransfusionPipeline loads.

    Example: megafusion checkpoint export runs/quickstart/checkpoints/step-00000600 exported
    """
    from megafusion.commands.checkpoint import export

    export(path, out, weights)


data_app = typer.Typer(
    no_args_is_help=True,
    help="Look into folders of shards, or check them.\n\n"
    "Example: megafusion data inspect data/quickstart/pairs",
)
app.add_typer(data_app, name="data")

Shards = Annotated[Path, typer.Argument(help="Folder of shards: OUT/pairs or OUT/text of preprocess.")]


@data_app.command("inspect")
def data_inspect(
    shards: Shards,
    vae: Annotated[Path, typer.Option(help="Autoencoder that made the latents.")] = Path("data_prep/vae"),
    out: Annotated[Path, typer.Option(help="PNG file for the pictures.")] = Path("shards.png"),
    num: Annotated[int, typer.Option(help="Documents looked at, evenly taken.", min=1)] = 32,
) -> None:
    """Count what a folder of shards holds, and draw a page of its pictures, decoded, with their captions.

    Example: megafusion data inspect data/quickstart/pairs --out pairs.png
    """
    from megafusion.commands.data import inspect

    inspect(shards, vae, out, num)


@data_app.command("verify")
def data_verify(shards: Shards) -> None:
    """Hash every shard and make its index anew; exit status 2 names the first file that differs.

    Example: megafusion data verify data/quickstart/pairs
    """
    from megafusion.commands.data import verify

    verify(shards)


if __name__ == "__main__":
    process()
