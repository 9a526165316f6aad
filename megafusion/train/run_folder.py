"""The run folder: frozen configuration, environment, and the checks of a resumed run against them."""

import json
import platform
import re
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

from megafusion.checkpoint.folder import newest_step
from megafusion.config import changed_keys, dump_config, load_config
from megafusion.data.manifest import load_manifest
from megafusion.engine.optimizer import learning_rate
from megafusion.errors import UserError, refuse_os_errors
from megafusion.storage import refuse_foreign, write_file
from megafusion.train.config import RunConfig

# Keys that a resumed run may change: they change no number of a step that is not skipped.
FREE_KEYS = (
    "out",
    "data.num_workers",
    "data.prefetch",
    "data.on_error",
    "data.max_skip_rate",
    "data.cache_dir",
    "data.cache_bytes",
    "checkpoint.",
    "train.micro_batch_size",
    "train.recompute",
    "train.compile",
    "parallel.",
    "telemetry.",
    "resilience.",
    "sampling.",
    "samples.",
)

RECIPE_KEYS = ("train.num_steps", "optimizer.learning_rate", "optimizer.gradient_clip", "model.attention")
"""Keys that may also change, to make a run longer, to save one that diverges or to use another kernel;
starts.json records it."""

_LOCATION = re.compile(r"data\.(tokenizer|vae|sources\..+\.path)")
"""Keys that may name another place of the same files, by the hashes that the run recorded."""


def changed_recipe(config: RunConfig) -> dict[str, list] | None:
    """Recipe keys and locations that a resumed run changes: by key, the run's value and the new one.

    None if the folder holds no run yet. Raises UserError if other keys differ, or the run is longer already.
    """
    if not (config.out / "config.yaml").is_file():
        return None
    changed = changed_keys(load_run_config(config.out), config)
    changed = {key: values for key, values in changed.items() if not key.startswith(FREE_KEYS)}
    refused = [key for key in changed if key not in RECIPE_KEYS and not _LOCATION.fullmatch(key)]
    if refused:
        raise UserError(
            f"{config.out}: holds a run with other values of {', '.join(refused)} (see its config.yaml); "
            "a run keeps its recipe: choose another out="
        )
    if "train.num_steps" in changed and (step := newest_step(config.out)) > config.train.num_steps:
        raise UserError(
            f"{config.out}: has trained {step} steps, more than train.num_steps {config.train.num_steps}; "
            f"give at least {step}"
        )
    return changed


def describe_changes(config: RunConfig, changed: dict[str, list], step: int) -> list[str]:
    """A sentence for each changed key, and one if they change the learning rate of the next update."""
    end = config.train.num_steps
    without_effect = ", without effect: all steps are made" if step >= end else ""
    said = [
        f"resumes with {key} {now} instead of {before}{without_effect if key in RECIPE_KEYS else ''}"
        for key, (before, now) in changed.items()
    ]
    if changed and step < end:
        began = load_run_config(config.out)
        before = learning_rate(step, began.train.num_steps, began.optimizer)
        now, last = (learning_rate(each, end, config.optimizer) for each in (step, end))
        if now != before:
            said.append(
                f"the learning rate of step {step + 1} is {now:.3g} instead of {before:.3g}, and ends at "
                f"{last:.3g} after step {end} (optimizer.schedule {config.optimizer.schedule})"
            )
    return [f"{config.out}: {sentence}" for sentence in said]


def freeze(config: RunConfig, tokenizer_hash: str, vae_hash: str) -> dict[str, list]:
    """Freeze a new run's configuration and environment, or check a resumed run's; see `changed_recipe`."""
    changed = changed_recipe(config)
    hashes = {"tokenizer": tokenizer_hash, "vae": vae_hash, "shards": _shard_hashes(config)}
    path = config.out / "config.yaml"
    unwritable = f"{config.out}: cannot be written", "; free space or choose another out="
    if changed is None:
        # Left by an attempt that hung or was killed at start, or by a launcher: no reason to refuse.
        beside = ("stacks", "launch", "logs", "environment.json", ".environment.json.*", ".config.yaml.*")
        refuse_foreign(config.out, path.name, beside)
        with refuse_os_errors(*unwritable):
            write_file(config.out / "environment.json", json.dumps(_environment() | hashes, indent=1) + "\n")
            write_file(path, dump_config(config))
        return {}
    _check_inputs(config, changed, hashes)
    if any(map(_LOCATION.fullmatch, changed)):  # other commands find the files by config.yaml
        began, now = load_run_config(config.out), config.data
        moved = {"tokenizer": now.tokenizer, "vae": now.vae, "sources": now.sources}
        data = began.data.model_copy(update=moved)
        with refuse_os_errors(*unwritable):
            write_file(path, dump_config(began.model_copy(update={"data": data})))
    return changed


def _environment() -> dict:
    """The environment of a run beside its configuration and data: versions, devices, git state."""
    import torch  # `launch` does without
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    packages = ("megafusion", "torch", "deepspeed", "diffusers", "numpy", "sentencepiece", "webdataset")
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "cpu",
        "world_size": dist.get_world_size(),
        "num_threads": torch.get_num_threads(),
        "packages": {name: version(name) for name in packages},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changes": _git("status", "--short"),
    }


def _git(*arguments: str) -> str | None:
    """Output of git about the source tree; None outside a repository."""
    here = Path(__file__).parent
    try:
        answer = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def _check_inputs(config: RunConfig, changed: dict[str, list], hashes: dict) -> None:
    """Raise UserError if a resumed run would read other shards, or another tokenizer or autoencoder."""
    recorded = json.loads((config.out / "environment.json").read_text())
    began = {f"data.sources.{name}": each for name, each in recorded["shards"].items()}
    found = {f"data.sources.{name}": each for name, each in hashes["shards"].items()}
    for name in ("tokenizer", "vae"):
        found[key := f"data.{name}"] = hashes[name]
        # Earlier versions recorded the shards alone.
        began[key] = recorded.get(name, None if key in changed else hashes[name])
    for key, value in found.items():
        if value != began[key]:
            raise UserError(
                f"{key}: other files than {config.out} was started with; restore those, or choose another "
                "out= to train on these"
            )


def _shard_hashes(config: RunConfig) -> dict[str, list[str]]:
    return {
        name: [shard.sha256 for shard in load_manifest(source.path).shards]
        for name, source in config.data.sources.items()
    }


def load_run_config(folder: Path) -> RunConfig:
    """The frozen configuration of a run folder."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: no config.yaml, so not a run folder; `megafusion train` makes one")
    return load_config(RunConfig, path)
