"""The record of a run: its folder, frozen configuration, and what it was started with."""

import json
import platform
import resource
import subprocess
import time
from functools import reduce
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
    "checkpoint.",
    "train.micro_batch_size",
    "train.recompute",
    "train.compile",
    "parallel.",
    "telemetry.",
    "resilience.max_crashes",
    "resilience.timeout_seconds",
    "samples.",
)

RECIPE_KEYS = ("optimizer.learning_rate", "optimizer.gradient_clip")
"""Keys that may also differ, for a run that would go astray otherwise; starts.json records what they were."""


def changed_recipe(config: RunConfig) -> dict[str, list] | None:
    """What a run to be resumed changes of its recipe: by key, the value that it began with and the new one.

    None where the folder holds no run yet. UserError where it holds one that may not change so.
    """
    if not (config.out / "config.yaml").is_file():
        return None
    began = load_run_config(config.out)
    changed = [key for key in changed_keys(began, config) if not key.startswith(FREE_KEYS)]
    refused = [key for key in changed if key not in RECIPE_KEYS]
    if refused:
        raise UserError(
            f"{config.out}: holds a run with other values of {', '.join(refused)} (see its config.yaml); "
            "a run keeps its length and recipe: choose another out="
        )
    return {key: [_value(began, key), _value(config, key)] for key in changed}


def freeze(config: RunConfig) -> dict[str, list]:
    """Write the run folder's record, or check that a run to be resumed is this one; see `changed_recipe`."""
    changed = changed_recipe(config)
    if changed is not None:
        _check_shards(config)
        return changed
    # A start that hung has left its stacks, a launcher its job and logs, one that was killed a part of its
    # record: no reason to refuse a start.
    beside = ("stacks", "launch", "logs", "environment.json", ".environment.json.*", ".config.yaml.*")
    refuse_foreign(config.out, "config.yaml", beside)
    environment = json.dumps(_environment(config), indent=1) + "\n"
    try:
        write_file(config.out / "environment.json", environment)
        write_file(config.out / "config.yaml", dump_config(config))
    except OSError as error:
        raise UserError(
            f"{config.out}: cannot be written ({error.strerror or error}); make room, or choose another out="
        ) from error
    return {}


def _value(config: RunConfig, key: str) -> object:
    """What stands at a dotted key."""
    return reduce(getattr, key.split("."), config)


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
