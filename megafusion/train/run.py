"""A run around its training loop: joining the ranks, resuming, logging, saving, stopping, publishing."""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

from megafusion.device import default_device

import torch
import torch.distributed as dist
from rich.filesize import decimal

from megafusion.checkpoint.folder import complete_checkpoints, newest_step, verify_checkpoint
from megafusion.checkpoint.manager import CheckpointManager
from megafusion.engine.ema import Ema, EmaUpdate
from megafusion.engine.process_group import process_group
from megafusion.errors import ExitStatus, UserError
from megafusion.objective.losses import Losses
from megafusion.parallel.degrees import data_degree
from megafusion.parallel.dropout import seed_dropout
from megafusion.parallel.errors import raise_on_all_ranks
from megafusion.parallel.memory import state_bytes
from megafusion.parallel.mesh import AXES, make_mesh
from megafusion.resilience.attempts import CRASHED, Attempts
from megafusion.resilience.rollback import Rollback
from megafusion.resilience.self_test import self_test
from megafusion.resilience.signals import StopSignals
from megafusion.resilience.watchdog.failures import describe, is_lost
from megafusion.resilience.watchdog.thread import Watchdog
from megafusion.sequence.packing import PackedBatch
from megafusion.telemetry.metrics import Metrics
from megafusion.telemetry.stragglers import StragglerMonitor
from megafusion.telemetry.throughput import PackingMonitor, throughput
from megafusion.train.build import build_components, build_engine
from megafusion.train.checkpoint_policy import CheckpointPolicy
from megafusion.train.config import RunConfig
from megafusion.train.image_encoder import ImageEncoder
from megafusion.train.init_from import Origin, describe_start, open_origin
from megafusion.train.open_model import export_lora
from megafusion.train.run_folder import check_run_folder, describe_changes, freeze
from megafusion.train.samples import SampleSheets
from megafusion.train.validation import Validation

Outcome = Literal["finished", "stopped", "preempted"]


class Run:
    """One attempt at a run, on every rank: `with run.attempt():` around the loop over `steps()`."""

    outcome: Outcome = "preempted"

    def __init__(self, config: RunConfig, stop_after: int | None, signals: StopSignals):
        self._config, self._signals = config, signals
        self._last_step = min(config.train.num_steps, stop_after or config.train.num_steps)
        self._attempts = Attempts(config.out)
        self.step = 0
        """Updates made so far, over all attempts; the latest counts until `confirm_step` says otherwise."""
        self._is_confirmed = True
        self._stops = False
        self._validated: tuple[int, float] | None = None
        """Step and total loss of the latest validation."""

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Join the ranks, check everything, build the engine and load the latest checkpoint; after the block
        save if steps are left, wait for the last checkpoint and publish a finished model.

        `outcome` then tells which. Every way out is recorded in the run folder.
        """
        with self._joined() as self._watchdog, self._recorded():
            self._is_rank0 = dist.get_rank() == 0
            self._metrics = Metrics(
                self._config.telemetry,
                self._config.out,
                self._config.train.num_steps,
                stops_on_write_error=self._config.checkpoint.on_save_error == "stop",
                silent=not self._is_rank0,
            )
            hosts, is_asked_to_stop = self._check()
            if is_asked_to_stop:
                self._stops = True
                yield
                return
            with ExitStack() as self._outputs:
                self._start(hosts)
                yield
                self._finish()
            if self.outcome == "finished" and self._sampler:
                self._publish(self._sampler)
            self.engine.close()

    def steps(self) -> Iterator[int]:
        """Yield the number of updates made, until the last step or a stop request."""
        while self.step < self._last_step and not self._stops:
            self._begin_step()
            yield self.step

    def next_batch(self) -> list[PackedBatch]:
        """This rank's micro-batches of the next global batch, images as latents.

        A UserError of one rank's data is raised on all ranks by the engine's step.
        """
        consensus, micro_batches = self.engine.consensus, []
        consensus.wants_stop = self._signals.requested
        with consensus.defer_errors():
            with self._stragglers.waiting_for_data():
                batch = self._loader.next()
            self._packing.add(batch)
            micro_batches = self._encoder.encode(batch)
        if self._config.train.lora and self._config.train.lora.dropout:
            seed_dropout(self._config.seed, self._loader.state_dict()["batch_number"], self._mesh)
        return micro_batches

    def average(self) -> EmaUpdate:
        """The update of the averages that belongs to the next update of the weights."""
        return self._ema.after(self.step + 1)

    def complete_step(self, losses: Losses, learning_rate: float) -> None:
        """Count the step; log, save and sample if due.

        Whether it was an update at all is read before the next one is made, or here if that matters now.
        """
        config = self._config
        self._stops = self.engine.consensus.stops
        self.step += 1
        self._is_confirmed = False
        self._metrics.advance(self.step)
        logs = self._is_due(config.telemetry.log_every) or self.step == 1
        saves = self._is_due(config.checkpoint.every)
        if not (logs or saves or self._stops or self._rollback.may_be_due) or not self.confirm_step():
            return
        if logs:
            self._log(losses, learning_rate)
        if saves:
            self._save()
        if config.samples.every and self._is_due(config.samples.every) and not self._stops:
            self._sample()

    def confirm_step(self) -> bool:
        """Whether the latest step made an update; rolls back to a checkpoint if one is due.

        Waits for the device to have computed the step's gradients. A skipped step is not counted.
        """
        if self._is_confirmed:
            return True
        self._is_confirmed = True
        if message := self._rollback.record_step(self.step - 1):
            self._metrics.say(message)
        if not self.engine.consensus.is_skipped:
            return True
        self.step -= 1
        self._metrics.advance(self.step)
        if self._rollback.is_due:
            self._watchdog.beat(self.step, "roll back")
            self._checkpoints.wait()
            state = self._checkpoints.load_latest()
            self.step, self._validated = self._rollback.roll_back(state), _validation_of(state)
            with self.engine.consensus.defer_errors():
                self._metrics.rewind(self.step)
        self._begin_step()
        return False

    def _begin_step(self) -> None:
        """Tell the watchdog and the run folder which step is being computed."""
        self._watchdog.beat(self.step + 1, "train")
        self._attempts.at(self.step + 1)

    def _is_due(self, every: int) -> bool:
        return self.step == self._last_step or (every > 0 and self.step % every == 0)

    @contextmanager
    def _joined(self) -> Iterator[Watchdog]:
        """The process group, and the watchdog in it."""
        timeout = self._config.resilience.timeout_seconds
        with ExitStack() as stack:
            try:
                # A minute more than the watchdog's timeout, so that its message comes before torch's.
                stack.enter_context(process_group(timeout + 60))
                self._signals.begin()
                watchdog = stack.enter_context(Watchdog(self._config.out, timeout))
            except RuntimeError as error:
                if not is_lost(error):
                    raise
                print(
                    f"megafusion: a process was lost before all ranks had connected ({describe(error)}); "
                    "start again",
                    file=sys.stderr,
                )
                raise SystemExit(ExitStatus.RETRY) from error
            yield watchdog

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Record how this attempt ended."""
        try:
            yield
        except UserError as error:
            self._attempts.end("refused", str(error))
            raise
        except KeyboardInterrupt:
            self._attempts.end("interrupted")
            raise
        except Exception as error:
            lost = "a process was lost or hung: " if is_lost(error) else ""
            self._attempts.end(CRASHED, lost + describe(error))
            raise
        self._attempts.end(self.outcome)

    def _check(self) -> tuple[list[str], bool]:
        """Refuse what does not fit together, claim the run folder, test the devices; see `self_test`."""
        config = self._config
        # Before the mesh makes groups: a rank whose configuration is refused joins this collective alone.
        with raise_on_all_ranks():
            data_degree(config.parallel, dist.get_world_size())
        self._mesh = make_mesh(config.parallel)
        with raise_on_all_ranks():
            self._components = build_components(config, self._mesh)
            self._loader = self._components.loader
            if self._is_rank0:
                parts = self._components
                tokenizer = parts.tokenizer  # whose bos and eos may be in a file beside the hashed one
                identity = f"{tokenizer.hash} bos {tokenizer.bos} eos {tokenizer.eos}"
                check_run_folder(config)
                self._attempts.claim()
                changed = freeze(config, identity, parts.codec.hash, parts.started_from)
                step = newest_step(config.out)
                self._attempts.begin(dist.get_world_size(), step, changed)
                warnings = config.warnings() + parts.warnings(config)
                for sentence in warnings + describe_changes(config, changed, step):
                    self._metrics.say(sentence)
                if parts.started_from:
                    self._metrics.say(f"{config.out}: {describe_start(parts.started_from)}")
        self._watchdog.beat(0, "self-test")
        return self_test(config.out, default_device(), self._signals.requested)

    def _start(self, hosts: list[str]) -> None:
        """Build the engine, load the latest checkpoint, open the outputs."""
        config, mesh = self._config, self._mesh
        self._watchdog.beat(0, "engine")
        resumes, origin = self._find_start()
        self.engine = build_engine(
            config, mesh, lambda name: resumes or bool(origin and name in origin.whole)
        )
        self._ema = Ema(self.engine.optimizer_state.shards, config.train.ema_decay)
        self._rollback = Rollback(config.resilience, self.engine.consensus)
        self._manager = CheckpointManager(
            config.out / "checkpoints", self.engine.optimizer_state, self._ema, config.checkpoint
        )
        self._checkpoints = CheckpointPolicy(config.checkpoint, self._manager, self._metrics.say)
        self._watchdog.beat(0, "load checkpoint")
        state = self._checkpoints.load_latest()
        self._began = time.monotonic()
        """When the run would have begun if it had trained without a break."""
        if state is None and resumes:
            raise UserError(
                f"{self._manager.folder}: the checkpoint was removed while the run started; start again",
                on_every_rank=True,
            )
        if state is None and origin:
            self._manager.initialize(origin.source, origin.names)
        if state is not None:
            self.step = state["step"]
            self._validated = _validation_of(state)
            self._loader.load_state_dict(state["data"])
            self._rollback.load_state_dict(state.get("health", {}))
            self._began -= state["seconds"]
        self._attempts.resumed(self.step)
        self._sampler = SampleSheets(config, self._components, self.engine.device) if self._is_rank0 else None
        self._encoder = self._make_encoder()
        self._outputs.enter_context(self._manager)
        self._outputs.enter_context(self._loader)
        with raise_on_all_ranks():
            self._outputs.enter_context(self._metrics.open(self.step))
        if self.step:
            self._metrics.say(f"{config.out}: {self._standing()}")
        if dist.get_world_size() > 1:
            self._metrics.say(self._layout())
        self._validation = self._open_validation()
        self._packing = PackingMonitor(
            config.data.sources,
            config.train.global_batch_size,
            config.model,
            config.sequence_shape,
            self.engine,
            self._loader.state_dict(),
            state.get("flops") if state else 0,
            config.objective.alignment,
        )
        self._stragglers = StragglerMonitor(
            self.engine.stage, self.engine.device, hosts, mesh.size("pipeline")
        )

    def _find_start(self) -> tuple[bool, Origin | None]:
        """Whether rank 0 sees a checkpoint to resume from; if not, `train.init_from` where it is given."""
        found = [bool(complete_checkpoints(self._config.out / "checkpoints"))]
        dist.broadcast_object_list(found)
        if found[0] or not self._config.train.init_from:
            return found[0], None
        with raise_on_all_ranks():
            origin = open_origin(self._config)
            if origin.checkpoint:
                verify_checkpoint(origin.checkpoint, dist.get_rank(), dist.get_world_size())
        return False, origin

    def _make_encoder(self) -> ImageEncoder:
        config, parts = self._config, self._components
        dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
        sizes, patch_size = config.model.latent_sizes, config.model.patch_size
        return ImageEncoder(parts.codec, sizes, self.engine.device, dtype, patch_size, parts.vision)

    def _open_validation(self) -> Validation | None:
        config, loader = self._config, self._components.validation_loader
        if not (config.data.validation and loader):
            return None
        parts, weight = self._components, config.objective.image_weight
        return Validation(config.data.validation, loader, parts.tokenizer, self.engine, self._encoder, weight)

    def _validate(self) -> dict[str, float]:
        """The losses on held-out documents if they are due."""
        config = self._config.data.validation
        if not (config and self._validation and self._is_due(config.every)):
            return {}
        self._watchdog.beat(self.step, "validate")
        with self._stragglers.paused():
            figures = self._validation.measure()
        self._validated = self.step, figures["validation_loss"]
        return figures

    def _log(self, losses: Losses, learning_rate: float) -> None:
        config = self._config
        speed, warning = self._stragglers.read()
        figures = {
            "text_loss": losses.text.item(),
            "image_loss": losses.image.item(),
            **({"alignment_loss": losses.alignment.item()} if config.objective.alignment else {}),
            "gradient_norm": self.engine.grad_norm(),
            "learning_rate": learning_rate,
            "seconds": time.monotonic() - self._began,
        }
        figures |= self._packing.read(self._loader.state_dict()) | speed
        figures |= throughput(
            speed["step_seconds"],
            config.train,
            config.model,
            config.sequence_shape,
            self._packing.work,
            config.objective.alignment,
        )
        figures |= self._validate()
        with self.engine.consensus.defer_errors():
            self._metrics.log(self.step, figures | self._rollback.counts | self._checkpoints.counts)
        if warning:
            self._metrics.say(warning)

    def _save(self, is_last: bool = False) -> None:
        self._watchdog.beat(self.step, "checkpoint")
        state = {
            "step": self.step,
            "seconds": time.monotonic() - self._began,
            "topology": {"world_size": dist.get_world_size(), **self._config.parallel.model_dump()},
            "health": self._rollback.state_dict(),
            "flops": self._packing.flops(self._loader.state_dict()),
        }
        if self._validated and self._validated[0] == self.step:
            state["validation_loss"] = self._validated[1]
        is_last |= self.step == self._last_step
        self._checkpoints.save(state, self._loader.state_dict(), is_last=is_last)

    def _sample(self) -> None:
        """Write a sample sheet on rank 0, from this step's checkpoint: no rank holds the whole average."""
        if not self._sampler:
            return
        self._watchdog.beat(self.step, "samples")
        with self._stragglers.paused():
            if checkpoint := self._manager.latest_complete():
                with self.engine.consensus.defer_errors(), self._metrics.handle_write_errors("samples"):
                    self._metrics.log_samples(*self._sampler.show(checkpoint))

    def _finish(self) -> None:
        """Save if steps are left, and wait for the last checkpoint."""
        is_unfinished = self.step < self._last_step
        if is_unfinished:
            self._metrics.say(
                f"asked to stop: a checkpoint of step {self.step}, then exit status {ExitStatus.RETRY}"
            )
            self._save(is_last=True)
        self._checkpoints.wait(not is_unfinished, then="the steps since its last checkpoint are lost")
        self.engine.consensus.raise_deferred()
        self._watchdog.beat(self.step, "end")
        if not is_unfinished:
            self.outcome = "finished" if self.step == self._config.train.num_steps else "stopped"

    def _publish(self, sampler: SampleSheets) -> None:
        """Write the averaged model of the last checkpoint as a pipeline folder, and its LoRA adapter."""
        folder, checkpoint = self._config.out / "pipeline", complete_checkpoints(self._manager.folder)[-1]
        sampler.load(checkpoint).save_pretrained(folder)
        self._metrics.say(f"{folder}: the model; megafusion generate {self._config.out}")
        if self._config.train.lora:
            export_lora(self._config, checkpoint, self._config.out / "lora")
            self._metrics.say(f"{self._config.out / 'lora'}: the LoRA adapter, as PEFT reads it")

    def _standing(self) -> str:
        """Where a resumed run stands."""
        if self.step >= self._config.train.num_steps:
            return f"is finished after step {self.step}; a larger train.num_steps makes it longer"
        if self.step >= self._last_step:
            return (
                f"is at step {self.step}, so --stop-after {self._last_step} trains nothing; name a later step"
            )
        return f"resumes after step {self.step}"

    def _layout(self) -> str:
        """The ranks along each axis, and the bytes of state on rank 0."""
        axes = " x ".join(f"{axis} {self._mesh.size(axis)}" for axis in AXES)
        held = state_bytes(self.engine.stage, self._mesh, 4 if self._config.train.precision == "fp32" else 2)
        parts = ", ".join(f"{name} {decimal(size)}" for name, size in held._asdict().items())
        return f"{dist.get_world_size()} ranks: {axes}; rank 0 holds {parts}"


def _validation_of(state: dict | None) -> tuple[int, float] | None:
    """Step and loss of the validation that a checkpoint was saved behind, if it was."""
    if state is None or "validation_loss" not in state:
        return None
    return state["step"], state["validation_loss"]
