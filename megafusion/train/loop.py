"""A run from its configuration to its last step: resume, loop, publish."""

import sys
from typing import Literal

import torch.distributed as dist
from rich.filesize import decimal

from megafusion.checkpoint.folder import complete_checkpoints, newest_step
from megafusion.checkpoint.manager import CheckpointManager
from megafusion.engine.ema import Ema
from megafusion.engine.engine import Engine
from megafusion.engine.optimizer import learning_rate
from megafusion.engine.process_group import local_device, start_process_group
from megafusion.errors import UserError
from megafusion.parallel.errors import raise_on_all_ranks
from megafusion.parallel.memory import state_bytes
from megafusion.parallel.mesh import AXES, make_mesh
from megafusion.resilience.attempts import CRASHED, Attempts
from megafusion.resilience.exit_status import ExitStatus
from megafusion.resilience.rollback import Rollback
from megafusion.resilience.self_test import self_test
from megafusion.resilience.signals import StopSignals
from megafusion.resilience.watchdog.failures import describe, is_lost
from megafusion.resilience.watchdog.thread import Watchdog
from megafusion.telemetry.metrics import Metrics
from megafusion.telemetry.stragglers import StragglerMonitor
from megafusion.telemetry.throughput import PackingMonitor, StepTimer, step_figures
from megafusion.train.build import build_components, build_engine
from megafusion.train.checkpoint_policy import CheckpointPolicy
from megafusion.train.config import RunConfig
from megafusion.train.image_encoder import ImageEncoder
from megafusion.train.run_folder import freeze
from megafusion.train.samples import Sampler

Ended = Literal["finished", "stopped", "preempted"]


def train(config: RunConfig, stop_after: int | None = None, signals: StopSignals | None = None) -> Ended:
    """Train, resuming from the newest sound checkpoint of the run folder if there is one.

    stop_after: end the process's work after this many steps of the run, with a checkpoint. signals: what
    asks the run to stop; then all ranks finish the step, save, and return "preempted". Raises UserError
    before the first step for whatever does not fit together.
    """
    signals, attempts = signals or StopSignals(), Attempts(config.out)
    try:
        # A minute more than the watchdog gives, so that its message comes before torch's.
        start_process_group(config.resilience.timeout_seconds + 60)
        signals.begin()
        watched = Watchdog(config.out, config.resilience.timeout_seconds)
    except RuntimeError as error:
        if not is_lost(error):
            raise
        _say(
            f"megafusion: a process was lost before all ranks had connected ({describe(error)}); start again"
        )
        raise SystemExit(ExitStatus.RETRY) from error
    with watched as watchdog:
        try:
            ended = _train(config, stop_after, signals, watchdog, attempts)
        except UserError as error:
            attempts.end("refused", str(error))
            raise
        except KeyboardInterrupt:
            attempts.end("interrupted")
            raise
        except Exception as error:
            lost = "a process was lost or hung: " if is_lost(error) else ""
            attempts.end(CRASHED, lost + describe(error))
            raise
        attempts.end(ended)
    return ended


def _train(
    config: RunConfig, stop_after: int | None, signals: StopSignals, watchdog: Watchdog, attempts: Attempts
) -> Ended:
    is_first = dist.get_rank() == 0
    with raise_on_all_ranks():
        mesh = make_mesh(config.parallel)
    with raise_on_all_ranks():
        parts = build_components(config, mesh)
        loader = parts.loader
        if is_first:
            changed = freeze(config)
            attempts.claim()
            attempts.begin(dist.get_world_size(), newest_step(config.out), changed)
            for key, (before, now) in changed.items():
                _say(f"{config.out}: resumes with {key} {now} instead of {before}")
    watchdog.beat(0, "self-test")
    hosts, is_asked_to_stop = self_test(config.out, local_device(), signals.requested)
    if is_asked_to_stop:
        return "preempted"
    watchdog.beat(0, "engine")
    engine = build_engine(config, mesh)
    speeds = StragglerMonitor(engine.stage, engine.device, hosts, mesh.size("pipeline"))
    rollback = Rollback(config.resilience, engine.consensus)
    ema = Ema(engine.optimizer_state.shards, config.train.ema_decay)
    folder = config.out / "checkpoints"
    manager = CheckpointManager(
        folder, engine.optimizer_state, ema, config.checkpoint.keep_last, config.checkpoint.keep_every
    )
    say = _say if is_first else _say_nothing
    checkpoints = CheckpointPolicy(config.checkpoint, folder, manager, engine.device, say)
    laid_out = {"world_size": dist.get_world_size(), **config.parallel.model_dump()}
    step, spent_seconds = 0, 0.0
    watchdog.beat(0, "load checkpoint")
    if state := checkpoints.load_latest():
        step, spent_seconds = state["step"], state["seconds"]
        loader.load_state_dict(state["data"])
        rollback.load_state_dict(state.get("health", {}))
    attempts.resumed(step)
    last_step = min(config.train.num_steps, stop_after or config.train.num_steps)
    sampler = Sampler(config, parts, engine.device) if is_first else None
    num_rows, shape = config.train.global_batch_size, config.sequence_shape
    timer = StepTimer(num_rows, shape, config.model, config.train.precision, step, spent_seconds)
    packing = PackingMonitor(config.data.sources, num_rows * shape.length, engine, loader.state_dict())
    encoder = ImageEncoder(parts.codec, config.model.latent_sizes, engine.device)
    stops = False

    def due(every: int) -> bool:
        return step == last_step or (every > 0 and step % every == 0)

    def state_now() -> dict:
        return {
            "step": step,
            "seconds": timer.seconds(),
            "topology": laid_out,
            "health": rollback.state_dict(),
        }

    with raise_on_all_ranks():
        metrics = Metrics(
            config.telemetry,
            config.out,
            config.train.num_steps,
            step,
            stops_on_write_error=config.checkpoint.on_save_error == "stop",
            silent=not is_first,
        )
    with manager, loader, metrics:
        checkpoints.say = metrics.say
        if dist.get_world_size() > 1:
            metrics.say(_laid_out(engine, config))
        while step < last_step and not stops:
            watchdog.beat(step + 1, "train")
            attempts.at(step + 1)
            engine.consensus.wants_stop = signals.requested
            micro_batches = []
            with engine.consensus.defer_errors():
                with speeds.waiting_for_data():
                    batch = loader.next()
                micro_batches = encoder.encode(batch)
            rate = learning_rate(step, config.train.num_steps, config.optimizer)
            losses = engine.step(micro_batches, rate)
            stops = engine.consensus.stops
            if said := rollback.record_step(step):
                metrics.say(said)
            if rollback.is_due:
                watchdog.beat(step, "roll back")
                checkpoints.wait()
                state = checkpoints.load_latest()
                step = rollback.roll_back(state)
                timer.rewind(step)
                with engine.consensus.defer_errors():
                    metrics.rewind(step)
            if engine.consensus.is_skipped:
                continue
            step += 1
            ema.update(step)
            metrics.advance(step)
            if due(config.telemetry.log_every) or step == 1:
                speed, warning = speeds.read()
                figures = step_figures(losses, engine, rate) | packing.read(loader.state_dict())
                figures |= timer.read(step)
                with engine.consensus.defer_errors():
                    metrics.log(step, figures | speed | rollback.figures() | checkpoints.metrics())
                if warning:
                    metrics.say(warning)
            if due(config.checkpoint.every):
                watchdog.beat(step, "checkpoint")
                checkpoints.save(state_now(), loader.state_dict(), is_last=step == last_step)
            # From the checkpoint of this step, for no rank holds the whole average; the others go on.
            if sampler and config.samples.every and due(config.samples.every) and not stops:
                watchdog.beat(step, "samples")
                if checkpoint := manager.latest_complete():
                    with engine.consensus.defer_errors(), metrics.handle_write_errors("samples"):
                        metrics.log_samples(*sampler.show(checkpoint))
        if step < last_step:
            watchdog.beat(step, "checkpoint")
            metrics.say(f"asked to stop: a checkpoint of step {step}, then exit status {ExitStatus.RETRY}")
            checkpoints.save(state_now(), loader.state_dict(), is_last=True)
        checkpoints.wait(must_succeed=step == last_step)
        engine.consensus.raise_deferred()
        watchdog.beat(step, "end")
    if step < config.train.num_steps:
        return "preempted" if step < last_step else "stopped"
    if sampler:
        sampler.pipeline(complete_checkpoints(folder)[-1]).save_pretrained(config.out / "pipeline")
        metrics.say(f"{config.out / 'pipeline'}: the model; megafusion generate {config.out}")
    return "finished"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say_nothing(text: str) -> None:
    pass


def _laid_out(engine: Engine, config: RunConfig) -> str:
    """How the run lies over its ranks, and what one holds."""
    axes = " x ".join(f"{axis} {engine.mesh.size(axis)}" for axis in AXES)
    held = state_bytes(engine.stage, engine.mesh, 4 if config.train.precision == "fp32" else 2)
    parts = ", ".join(f"{name} {decimal(size)}" for name, size in held._asdict().items())
    return f"{dist.get_world_size()} ranks: {axes}; rank 0 holds {parts}"
