"""Train an AutoencoderKL on pictures: `megafusion train-vae configs/vae/emoji.yaml key.path=value ...`."""

import copy
import json
import math
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from data_prep.vae.checkpoint import load_checkpoint, read_meta, remove_checkpoint, save_checkpoint
from data_prep.vae.config import AutoencoderConfig, NetworkConfig, OptimizationConfig
from data_prep.vae.dataset import (
    find_shards,
    hash_shards,
    held_out_images,
    training_batches,
)
from data_prep.vae.evaluation import contact_sheet, latent_statistics, measure
from data_prep.vae.losses import AutoencoderLoss
from megafusion.config import changed_keys, dump_config, parse_config
from megafusion.errors import UserError
from megafusion.images.codec import ImageCodec, decode, encode
from megafusion.progress import progress_bar

# What a finished folder holds.
WRITTEN = (
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "recipe.yaml",
    "report.json",
    "reconstructions.png",
)
# Training pictures for the latent scale and shift: this many batches of this many.
STATISTICS_BATCHES = 16
STATISTICS_BATCH_SIZE = 64
# Steps between updates of the progress bar.
LOG_EVERY = 10
# A change of these between a stop and its continuation changes no step that is still to come.
FREE_ON_RESUME = ("out", "device", "num_threads", "optimization.checkpoint_every")


def train_autoencoder(config: AutoencoderConfig) -> dict:
    """Train, measure on held-out pictures, and write the autoencoder's folder; returns the report.

    The same call continues a training that was stopped, from its last checkpoint and with the same result.
    UserError for shards, sizes, weights or an output folder that do not fit.
    """
    started = time.perf_counter()
    _check_output(config.out)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    device = _device(config.device)
    torch.manual_seed(config.seed)
    model = build_model(config.network).to(device)
    latent_shape = ImageCodec(model).latent_shape(config.data.image_size, config.data.image_size)
    loss = AutoencoderLoss(config.loss).to(device)

    shards = find_shards(config.data)
    keys, held_out = held_out_images(config.data, shards)
    averaged, history, seconds_before = _optimize(config, model, loss, shards, held_out, device)

    batches = training_batches(config.data, shards, STATISTICS_BATCH_SIZE, config.seed)
    scale, shift = latent_statistics(averaged, islice(batches, STATISTICS_BATCHES))
    averaged.register_to_config(scaling_factor=scale, shift_factor=shift)
    codec = ImageCodec(averaged)
    measured, reconstructions = measure(codec, held_out)
    report = {
        **measured,
        "num_held_out_pictures": len(keys),
        "num_latent_numbers": math.prod(latent_shape),
        "latent_shape": list(latent_shape),
        "scaling_factor": scale,
        "shift_factor": shift,
        "num_parameters": sum(p.numel() for p in averaged.parameters()),
        "num_steps": config.optimization.num_steps,
        "seconds": round(seconds_before + time.perf_counter() - started, 1),
        "data_sha256": hash_shards(shards),
        "codec_sha256": codec.hash,
        "history": history,
    }
    _write(config, averaged, report, contact_sheet(held_out, reconstructions))
    remove_checkpoint(_state_folder(config.out))
    return report


def build_model(config: NetworkConfig) -> AutoencoderKL:
    """A freshly initialised AutoencoderKL of this shape."""
    for width in config.channels:
        if width % config.norm_num_groups:
            raise UserError(
                f"network.channels {width}: not divisible by network.norm_num_groups {config.norm_num_groups}"
            )
    num_levels = len(config.channels)
    num_pixels = 3 * config.unshuffle**2
    return AutoencoderKL(
        in_channels=num_pixels,
        out_channels=num_pixels,
        down_block_types=("DownEncoderBlock2D",) * num_levels,
        up_block_types=("UpDecoderBlock2D",) * num_levels,
        block_out_channels=tuple(config.channels),
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        mid_block_add_attention=config.mid_block_attention,
        scaling_factor=1.0,
    )


def _optimize(
    config: AutoencoderConfig,
    model: AutoencoderKL,
    loss: AutoencoderLoss,
    shards: list[Path],
    held_out: Tensor,
    device: torch.device,
) -> tuple[AutoencoderKL, list[dict], float]:
    """The training loop: the averaged model, the measurements on the way, seconds of earlier attempts."""
    started = time.perf_counter()
    options = config.optimization
    averaged = copy.deepcopy(model).requires_grad_(False)
    modules = {"model": model.train(), "averaged": averaged}
    optimizer = torch.optim.AdamW(
        model.parameters(), options.learning_rate, options.betas, weight_decay=options.weight_decay
    )
    optimizers = {"model": optimizer}
    if loss.discriminator is not None:
        modules["discriminator"] = loss.discriminator
        optimizers["discriminator"] = torch.optim.Adam(
            loss.discriminator.parameters(), config.loss.discriminator_learning_rate, (0.5, 0.9)
        )
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16")

    folder = _state_folder(config.out)
    meta = {"step": 0, "seconds": 0.0, "history": []}
    if (earlier := read_meta(folder)) is not None:
        _check_same_training(config, earlier["config"], folder)
        load_checkpoint(folder, modules, optimizers)
        meta = {key: earlier[key] for key in meta}
    history, first_step, seconds_before = meta["history"], meta["step"], meta["seconds"]
    batches = training_batches(config.data, shards, options.batch_size, config.seed, first_step)

    with progress_bar() as bar:
        task = bar.add_task("autoencoder", total=options.num_steps, completed=first_step, losses="")
        for step in range(first_step + 1, options.num_steps + 1):
            images = next(batches).to(device)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(options, step)
            with autocast:
                posterior = encode(model, images)
                reconstructions = decode(model, posterior.sample())
            reconstructions = reconstructions.float()
            terms = loss(images, reconstructions, posterior, step)
            sum(terms.values()).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            if loss.adversarial_at(step):
                # The autoencoder's backward pass went through the discriminator too.
                optimizers["discriminator"].zero_grad()
                terms["discriminator"] = loss.discriminator_loss(images, reconstructions)
                terms["discriminator"].backward()
                optimizers["discriminator"].step()
            _average(averaged, model, options.ema_decay, step)

            last = step == options.num_steps
            evaluates = step % options.evaluate_every == 0 or last
            saves = step % options.checkpoint_every == 0 and not last
            logs = step % LOG_EVERY == 0 or last
            # Weights spoilt by one such step spoil all later ones: looking now and then is enough, and a look
            # makes a GPU wait.
            if (evaluates or saves or logs) and not torch.isfinite(norm):
                raise UserError(
                    f"step {step}: the gradient is not finite; lower optimization.learning_rate "
                    f"(now {options.learning_rate}) or use optimization.precision=fp32"
                )
            if evaluates:
                measured, _ = measure(ImageCodec(averaged), held_out)
                losses = {name: float(term.detach()) for name, term in terms.items()}
                history.append({"step": step, **measured, **losses})
                if not bar.console.is_terminal:
                    bar.console.print(f"step {step}: held-out PSNR {measured['psnr']:.2f} dB")
            if logs:
                numbers = "  ".join(f"{name} {float(term.detach()):.4f}" for name, term in terms.items())
                if history:
                    numbers += f"  held-out {history[-1]['psnr']:.2f} dB"
                bar.update(task, completed=step, losses=numbers)
            if saves:
                meta = {
                    "step": step,
                    "seconds": seconds_before + time.perf_counter() - started,
                    "history": history,
                    "config": config.model_dump(mode="json"),
                }
                save_checkpoint(folder, modules, optimizers, meta)
    return averaged, history, seconds_before


def learning_rate(options: OptimizationConfig, step: int) -> float:
    """Rate of step 1, 2, ...: a linear warm-up, then a cosine that reaches zero after the last step."""
    if step <= options.warmup_steps:
        return options.learning_rate * step / options.warmup_steps
    num_decay_steps = max(options.num_steps - options.warmup_steps, 1)
    progress = (step - options.warmup_steps) / num_decay_steps
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


@torch.no_grad()
def _average(averaged: AutoencoderKL, model: AutoencoderKL, decay: float, step: int) -> None:
    # A young average would remember the random weights it began with.
    decay = min(decay, step / (step + 10))
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r}: not available here ({error})") from error


def _state_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.training")


def _check_same_training(config: AutoencoderConfig, earlier: dict, folder: Path) -> None:
    """Refuse to continue a training under another configuration: it would be neither of the two."""
    before = parse_config(AutoencoderConfig, earlier, str(folder))
    changed = [key for key in changed_keys(before, config) if key not in FREE_ON_RESUME]
    if changed:
        raise UserError(
            f"{folder}: holds an unfinished training with another {', '.join(changed)}; "
            "go back to those values, delete it, or choose another out"
        )


def _check_output(out: Path) -> None:
    """Refuse, before hours of training, a folder that holds anything that we would not write."""
    foreign = [p.name for p in out.iterdir() if p.name not in WRITTEN] if out.is_dir() else []
    if foreign or (out.exists() and not out.is_dir()):
        raise UserError(f"out {out}: holds something else {foreign[:3] or ''}; name a new folder")


def _write(config: AutoencoderConfig, model: AutoencoderKL, report: dict, sheet: Image.Image) -> None:
    """All files into a neighbouring folder, then one rename: `out` is complete or as it was."""
    out = config.out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        folder = Path(scratch) / out.name
        model.save_pretrained(folder, safe_serialization=True)
        (folder / "recipe.yaml").write_text(dump_config(config), encoding="utf-8")
        (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        sheet.save(folder / "reconstructions.png", optimize=True)
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors writes for its owner alone
        if out.exists():
            out.replace(Path(scratch) / "previous")
        folder.replace(out)
