"""Training of an AutoencoderKL or a VQModel: `megafusion train-vae configs/vae/emoji.yaml key=value ...`."""

import copy
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from megafusion.device import default_device, multiplies_bf16

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor

from data_prep.vae.checkpoint import load_checkpoint, read_meta, save_checkpoint
from data_prep.vae.codebook import CodebookRestarts
from data_prep.vae.config import AutoencoderConfig, OptimizationConfig
from data_prep.vae.dataset import (
    BEGINNING,
    Position,
    find_images,
    hash_files,
    held_out_images,
    training_batches,
)
from data_prep.vae.evaluation import contact_sheet, latent_statistics, measure
from data_prep.vae.losses import AutoencoderLoss
from data_prep.vae.model import build_model, check_output, write_autoencoder
from megafusion.config import changed_keys, parse_config
from megafusion.errors import UserError
from megafusion.images.autoencoder import Quantized, decode, encode
from megafusion.images.codec import ImageCodec
from megafusion.processes import stop_signals_wait
from megafusion.progress import progress_bar

NUM_STATISTICS_BATCHES = 16
STATISTICS_BATCH_SIZE = 64
"""Training images from which the latents' scale and shift are computed: so many batches of so many."""
LOG_EVERY = 10
"""Steps between updates of the progress bar."""
FREE_ON_RESUME = ("out", "overwrite", "device", "num_threads", "optimization.checkpoint_every")
"""Keys that may change on resume, because later steps do not depend on them."""


def train_autoencoder(config: AutoencoderConfig) -> dict:
    """Train, evaluate on held-out images, and write the autoencoder's folder; returns the report.

    Calling it again resumes a stopped training from its last checkpoint, with a bitwise identical result.
    UserError for invalid images, sizes, weights or output folder.
    """
    started = time.perf_counter()
    check_output(config.out, config.overwrite)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    device = _device(config.device)
    config = _with_precision(config, device)
    torch.manual_seed(config.seed)
    model = build_model(config.network).to(device)
    latent_shape = ImageCodec.of(model).latent_shape(config.data.image_size, config.data.image_size)
    loss = AutoencoderLoss(config.loss).to(device)
    folder = config.out.with_name(f"{config.out.name}.training")
    inputs = find_images(config.data, (config.out, folder))
    data_hash = hash_files(inputs.splits)
    keys, held_out = held_out_images(config.data, inputs.splits)

    training = _Training(config, model, loss, device, folder, data_hash)
    batches = training_batches(
        config.data, inputs.splits, config.optimization.batch_size, config.seed, training.position
    )
    training.run(batches, held_out)

    averaged = training.averaged
    if training.restarts:
        about: dict = {
            "num_codes": math.prod(latent_shape[1:]),
            "codebook_size": config.network.codebook_size,
        }
    else:
        batches = training_batches(config.data, inputs.splits, STATISTICS_BATCH_SIZE, config.seed)
        images = (pixels for pixels, _ in islice(batches, NUM_STATISTICS_BATCHES))
        scale, shift = latent_statistics(averaged, images)
        averaged.register_to_config(scaling_factor=scale, shift_factor=shift)
        about = {"num_latent_numbers": math.prod(latent_shape), "latent_shape": list(latent_shape)}
        about |= {"scaling_factor": scale, "shift_factor": shift}
    codec = ImageCodec.of(averaged)
    metrics, reconstructions = measure(codec, held_out)
    report = {
        **metrics,
        "num_held_out_images": len(keys),
        **about,
        "num_parameters": sum(p.numel() for p in averaged.parameters()),
        "num_steps": config.optimization.num_steps,
        "seconds": round(training.seconds_before + time.perf_counter() - started, 1),
        "data_sha256": data_hash,
        "ignored": dict(inputs.ignored),
        "codec_sha256": codec.hash,
        "history": training.history,
    }
    write_autoencoder(config, averaged, report, contact_sheet(keys, held_out, reconstructions))
    shutil.rmtree(training.folder, ignore_errors=True)
    return report


class _Training:
    """The training loop's state; it continues from the checkpoint in OUT.training if there is one."""

    def __init__(
        self,
        config: AutoencoderConfig,
        model: AutoencoderKL | VQModel,
        loss: AutoencoderLoss,
        device: torch.device,
        folder: Path,
        data_hash: str,
    ):
        options = config.optimization
        self._config, self._options = config, options
        self._model, self._loss, self._device = model.train(), loss, device
        self.averaged = copy.deepcopy(model).requires_grad_(False)
        self._modules: dict[str, torch.nn.Module] = {"model": model, "averaged": self.averaged}
        self.restarts: CodebookRestarts | None = None
        if config.network.codebook_size:
            self.restarts = CodebookRestarts(config.network.codebook_size).to(device)
            self._modules["restarts"] = self.restarts
        self._optimizers: dict[str, torch.optim.Optimizer] = {
            "model": torch.optim.AdamW(
                model.parameters(), options.learning_rate, options.betas, weight_decay=options.weight_decay
            )
        }
        if loss.discriminator is not None:
            self._modules["discriminator"] = loss.discriminator
            self._optimizers["discriminator"] = torch.optim.Adam(
                loss.discriminator.parameters(), config.loss.discriminator_learning_rate, (0.5, 0.9)
            )
        self.folder, self._data_hash = folder, data_hash
        self.num_done, self.seconds_before, self.history = 0, 0.0, []
        self.position = BEGINNING
        if (meta := read_meta(self.folder)) is not None:
            _check_same_training(config, meta, data_hash, self.folder)
            load_checkpoint(self.folder, self._modules, self._optimizers)
            self.num_done, self.seconds_before, self.history = meta["step"], meta["seconds"], meta["history"]
            # Earlier versions counted from the first epoch.
            self.position = Position(*meta.get("position", (0, self.num_done * options.batch_size)))

    def run(self, batches: Iterator[tuple[Tensor, Position]], held_out: Tensor) -> None:
        """Train until the last step; evaluate, log and checkpoint when due, and at a stop signal."""
        started, options = time.perf_counter(), self._options
        with stop_signals_wait() as stopped, progress_bar() as bar:
            task = bar.add_task("autoencoder", total=options.num_steps, completed=self.num_done, losses="")
            for step in range(self.num_done + 1, options.num_steps + 1):
                images, position = next(batches)
                terms, norm = self._step(step, images.to(self._device))
                is_last = step == options.num_steps
                evaluates = step % options.evaluate_every == 0 or is_last
                stops = stopped()
                saves = stops or (step % options.checkpoint_every == 0 and not is_last)
                logs = step % LOG_EVERY == 0 or is_last
                # NaN weights stay NaN, so checking now and then suffices, and a check synchronizes the GPU.
                if (evaluates or saves or logs) and not torch.isfinite(norm):
                    raise UserError(
                        f"step {step}: the gradient is not finite; lower optimization.learning_rate "
                        f"(now {options.learning_rate}) or use optimization.precision=fp32"
                    )
                if evaluates:
                    metrics, _ = measure(ImageCodec.of(self.averaged), held_out)
                    losses = {name: float(term.detach()) for name, term in terms.items()}
                    self.history.append({"step": step, **metrics, **losses})
                    if not bar.console.is_terminal:
                        bar.console.print(f"step {step}: held-out PSNR {metrics['psnr']:.2f} dB")
                if logs:
                    text = "  ".join(f"{name} {float(term.detach()):.4f}" for name, term in terms.items())
                    if self.history:
                        text += f"  held-out {self.history[-1]['psnr']:.2f} dB"
                    bar.update(task, completed=step, losses=text)
                if saves:
                    seconds = self.seconds_before + time.perf_counter() - started
                    values = self._config.model_dump(mode="json")
                    meta = {"step": step, "seconds": seconds, "history": self.history, "config": values}
                    meta |= {"data_sha256": self._data_hash, "position": position}
                    save_checkpoint(self.folder, self._modules, self._optimizers, meta)
                if stops:
                    break

    def _step(self, step: int, images_N3HW: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """One update of autoencoder, discriminator and average: the loss terms and the gradient norm."""
        optimizer = self._optimizers["model"]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self._options, step)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._options.precision == "bf16"):
            posterior = encode(self._model, images_N3HW)
            reconstructions = decode(self._model, posterior.sample())
        reconstructions = reconstructions.float()
        terms = self._loss(images_N3HW, reconstructions, posterior, step)
        sum(terms.values()).backward()
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._options.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if self._loss.is_adversarial_at(step):
            # The autoencoder's backward pass also left gradients in the discriminator.
            self._optimizers["discriminator"].zero_grad()
            terms["discriminator"] = self._loss.discriminator_loss(images_N3HW, reconstructions)
            terms["discriminator"].backward()
            self._optimizers["discriminator"].step()
        self._update_average(step)
        if self.restarts and isinstance(posterior, Quantized):
            self.restarts.update(step, posterior, [self._model, self.averaged])
        return terms, norm

    @torch.no_grad()
    def _update_average(self, step: int) -> None:
        # The decay rises, so that the average forgets the random initial weights.
        decay = min(self._options.ema_decay, step / (step + 10))
        torch._foreach_lerp_(list(self.averaged.parameters()), list(self._model.parameters()), 1 - decay)


def learning_rate(options: OptimizationConfig, step: int) -> float:
    """Learning rate of step 1, 2, ...: linear warmup, then cosine decay to zero after the last step."""
    if step <= options.warmup_steps:
        return options.learning_rate * step / options.warmup_steps
    num_decay_steps = max(options.num_steps - options.warmup_steps, 1)
    progress = (step - options.warmup_steps) / num_decay_steps
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=default_device() if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r}: not available here ({error})") from error


def _with_precision(config: AutoencoderConfig, device: torch.device) -> AutoencoderConfig:
    """The configuration with the precision that `auto` is on the device, which the recipe then records."""
    options, is_fast = config.optimization, multiplies_bf16(device)
    if options.precision == "bf16" and not is_fast:
        print(
            "warning: optimization.precision bf16 is about 20 times as slow as fp32 on this CPU, which has "
            "no instructions for it; set it to auto or fp32",
            file=sys.stderr,
        )
    if options.precision != "auto":
        return config
    options = options.model_copy(update={"precision": "bf16" if is_fast else "fp32"})
    return config.model_copy(update={"optimization": options})


def _check_same_training(config: AutoencoderConfig, meta: dict, data_hash: str, folder: Path) -> None:
    """UserError where the configuration or the images differ from those of the checkpoint to resume.

    Images may be at another place: they are the same if their hash is, which earlier versions did not record.
    """
    earlier = meta["config"]
    data = {"group_separator": "-"} | earlier["data"]  # what it was before it was a key
    before = parse_config(AutoencoderConfig, earlier | {"data": data}, str(folder))
    changed = {
        key: json.dumps(value)
        for key, (value, _) in changed_keys(before, config).items()
        if key not in FREE_ON_RESUME
    }
    if "data_sha256" in meta:
        changed.pop("data.images", None)
        if meta["data_sha256"] != data_hash:
            changed["data.images"] = "by their hash"
    if changed:
        others = ", ".join(f"{key} ({value})" for key, value in changed.items())
        raise UserError(
            f"{folder}: holds an unfinished training with another {others}; "
            "restore those values, delete it, or choose another out"
        )
