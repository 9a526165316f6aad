"""The record of a run: its folder, frozen configuration, and what it was started with."""

import json
import platform
import resource
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

from megafusion.config import changed_keys, dump_config, load_config
from megafusion.data.shards import load_manifest
from megafusion.errors import UserError
from megafusion.storage import refuse_foreign, write_file
from megafusion.train.config import RunConfig

# Keys that may differ between a run's start and its resumption: they decide no number of any step.
FREE_KEYS = (
    "out",
    "data.num_workers",
    "data.prefetch",
    "data.on_error",
    "data.max_skip_rate",
    "data.cache_dir",
    "data.cache_bytes",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_last",
    "train.keep_every",
    "train.on_save_error",
    "train.timeout_seconds",
    "train.micro_batch_rows",
    "train.recompute",
    "train.compile",
    "parallel.",
    "train.trackers",
    "train.wandb_project",
    "health.max_crashes",
    "samples.",
)


def refuse_other_recipe(config: RunConfig) -> bool:
    """Whether the run folder holds a run. UserError where it has another recipe."""
    if not (config.out / "config.yaml").is_file():
        return False
    changed = changed_keys(load_run_config(config.out), config)
    changed = [key for key in changed if not key.startswith(FREE_KEYS)]
    if changed:
        raise UserError(
            f"{config.out}: holds a run with other values of {', '.join(changed)} (see its config.yaml); "
            "a run keeps its length and recipe: choose another out="
        )
    return True


def freeze(config: RunConfig) -> None:
    """Write the run folder's record, or check that a run to be resumed is this one."""
    if refuse_other_recipe(config):
        _check_shards(config)
        return
    # A start that hung has left its stacks, a launcher its job and logs: no reason to refuse a start.
    refuse_foreign(config.out, "config.yaml", beside=("stacks", "launch", "logs"))
    environment = json.dumps(_environment(config), indent=1) + "\n"
    try:
        write_file(config.out / "environment.json", environment)
        write_file(config.out / "config.yaml", dump_config(config))
    except OSError as error:
        raise UserError(
            f"{config.out}: cannot be written ({error.strerror or error}); make room, or choose another out="
        ) from error


def _check_shards(config: RunConfig) -> None:
    """UserError where a run to be resumed would read other shards than it began with."""
    recorded = json.loads((config.out / "environment.json").read_text())["shards"]
    for name, hashes in _shard_hashes(config).items():
        if hashes != recorded[name]:
            raise UserError(
                f"data.sources.{name}: other shards than {config.out} was started with; bring those back, or "
                "choose another out= to train on these"
            )


def _shard_hashes(config: RunConfig) -> dict[str, list[str]]:
    return {
        name: [shard.sha256 for shard in load_manifest(source.path).shards]
        for name, source in config.data.sources.items()
    }


def _environment(config: RunConfig) -> dict:
    """What a run depends on beside its configuration: versions, git state, the shards' hashes."""
    packages = ("megafusion", "torch", "deepspeed", "diffusers", "numpy", "sentencepiece", "webdataset")
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or "cpu",
        "world_size": dist.get_world_size(),
        "num_threads": torch.get_num_threads(),
        "packages": {name: version(name) for name in packages},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changes": _git("status", "--short"),
        "shards": _shard_hashes(config),
    }


def _git(*arguments: str) -> str | None:
    """What git says of the source tree; None outside a repository."""
    here = Path(__file__).parent
    try:
        answer = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def load_run_config(folder: Path) -> RunConfig:
    """The frozen configuration of a run folder."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: no config.yaml, so no run folder; `megafusion train` makes one")
    return load_config(RunConfig, path)


def peak_memory_bytes() -> int:
    """Most memory that this process has held so far: the device's where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
