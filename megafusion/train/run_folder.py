"""The run folder: frozen configuration, environment, and the checks of a resumed run against them."""

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from megafusion.checkpoint.folder import newest_step
from megafusion.config import changed_keys, dump_config, load_config, parse_config
from megafusion.data.config import SourceConfig
from megafusion.data.manifest import load_manifest
from megafusion.data.remote import is_remote
from megafusion.engine.optimizer import learning_rate
from megafusion.errors import UserError, refuse_os_errors
from megafusion.processes import world_size
from megafusion.resilience.attempts import STEP, read_attempts
from megafusion.storage import folder_sha256, read_json, refuse_foreign, write_file
from megafusion.train.config import RunConfig

ENVIRONMENT = "environment.json"

# Keys that a resumed run may change: they change no number of a step that is not skipped.
FREE_KEYS = (
    "out",
    "data.validation",
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

RECIPE_KEYS = (
    "train.num_steps",
    "optimizer.learning_rate",
    "optimizer.learning_rates",
    "optimizer.gradient_clip",
    "model.attention",
)
"""Keys that may also change, to make a run longer, to save one that diverges or to use another kernel;
starts.json records it."""

LOCATION = re.compile(r"data\.(tokenizer|vae|(validation\.)?sources\..+\.path)|objective\.alignment\.model")
"""Keys that may name another place of the same files, by the hashes that the run recorded."""


def run_changes(config: RunConfig) -> dict[str, list] | None:
    """Keys in which a configuration differs from its folder's frozen one: the run's value and the new one.

    None if the folder holds no run yet.
    """
    if not (config.out / "config.yaml").is_file():
        return None
    began = load_run_config(config.out)
    changed = changed_keys(began, absolute_paths(config))
    order_began, order = (list(each.data.sources) for each in (began, config))
    if order_began != order:  # what is sampled depends on it
        changed["data.sources"] = [order_began, order]
    return changed


def changed_recipe(config: RunConfig) -> dict[str, list] | None:
    """Recipe keys and locations that a resumed run changes: by key, the run's value and the new one.

    None if the folder holds no run yet. Raises UserError if other keys differ, or the run is longer already.
    """
    if (changed := run_changes(config)) is None:
        return None
    step = newest_step(config.out)
    # What a run started from is without effect once it has a checkpoint.
    free = (*FREE_KEYS, "train.init_") if step else FREE_KEYS
    changed = {key: values for key, values in changed.items() if not key.startswith(free)}
    refused = [key for key in changed if not _is_recipe(key) and not LOCATION.fullmatch(key)]
    if refused:
        raise UserError(
            f"{config.out}: holds a run with other values of {', '.join(refused)} (see its config.yaml); "
            "a run keeps its recipe: choose another out="
        )
    if "train.num_steps" in changed and step > config.train.num_steps:
        raise UserError(
            f"{config.out}: has trained {step} steps, more than train.num_steps {config.train.num_steps}; "
            f"give at least {step}"
        )
    return changed


def _is_recipe(key: str) -> bool:
    return key.startswith(tuple(f"{each}." for each in RECIPE_KEYS)) or key in RECIPE_KEYS


def describe_changes(config: RunConfig, changed: dict[str, list], step: int) -> list[str]:
    """A sentence for each changed key, and one if they change the learning rate of the next update."""
    end = config.train.num_steps
    without_effect = ", without effect: all steps are made" if step >= end else ""
    said = [
        f"resumes with {key} {now} instead of {before}{without_effect if _is_recipe(key) else ''}"
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


def check_run_folder(config: RunConfig) -> None:
    """Raise UserError for a folder of another recipe (`changed_recipe`), or of files that are not a run's."""
    if changed_recipe(config) is None:
        # Left by an attempt that hung or was killed at start, or by a launcher: no reason to refuse.
        beside = ("stacks", "launch", "logs", STEP, ENVIRONMENT, ".environment.json.*", ".config.yaml.*")
        refuse_foreign(config.out, "config.yaml", beside)


def freeze(
    config: RunConfig, tokenizer_hash: str, vae_hash: str, started_from: dict | None = None
) -> dict[str, list]:
    """Freeze a new run's configuration and environment, or check a resumed run's; see `changed_recipe`.

    To be called under the run's lock. started_from: what `train.init_from` gave, of `check_origin`.
    """
    changed = changed_recipe(config)
    held_out = config.data.validation.sources if config.data.validation else {}
    hashes = {"tokenizer": tokenizer_hash, "vae": vae_hash, "shards": _shard_hashes(config.data.sources)}
    hashes["held_out"] = _shard_hashes(held_out)
    if aligned := config.objective.alignment:
        hashes["vision_model"] = folder_sha256(aligned.model, (".json", ".safetensors"))
    path = config.out / "config.yaml"
    unwritable = f"{config.out}: cannot be written", "; free space or choose another out="
    if changed is None:
        with refuse_os_errors(*unwritable):
            record = _environment() | hashes | {"init_from": started_from}
            write_file(config.out / ENVIRONMENT, json.dumps(record, indent=1) + "\n")
            write_file(path, dump_config(absolute_paths(config)))
        return {}
    recorded = _check_inputs(config, changed, hashes)
    began, now = load_run_config(config.out), absolute_paths(config)
    names = ["tokenizer", "vae", "sources"]
    # Validation may change otherwise, too: then config.yaml keeps what the run began with.
    places = {
        key: old for key, (old, _) in changed_keys(began, now).items() if key.startswith("data.validation")
    }
    if "held_out" in recorded:
        are_same = recorded["held_out"] == hashes["held_out"]
    else:  # earlier versions recorded none: what is still at the old place has not moved
        are_same = not any(is_remote(str(old)) or Path(str(old)).exists() for old in places.values())
    if are_same and all(map(LOCATION.fullmatch, places)):
        names.append("validation")
    data = began.data.model_copy(update={name: getattr(now.data, name) for name in names})
    # Of the objective nothing but a place may change.
    moved = began.model_copy(update={"data": data, "objective": now.objective})
    if changed_keys(began, moved):  # other commands find the files by config.yaml
        with refuse_os_errors(*unwritable):
            write_file(path, dump_config(moved))
    return changed


def _environment() -> dict:
    """The environment of a run beside its configuration and data: versions, devices, git state."""
    import torch  # `launch` does without

    on_gpu = torch.cuda.is_available()
    packages = (
        "megafusion",
        "torch",
        "deepspeed",
        "diffusers",
        "numpy",
        "sentencepiece",
        "tokenizers",
        "webdataset",
    )
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "cpu",
        "world_size": world_size(),
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


def _check_inputs(config: RunConfig, changed: dict[str, list], hashes: dict) -> dict:
    """Raise UserError if a resumed run would read other shards, or another of its models or tokenizer.

    Returns what environment.json recorded at the run's start.
    """
    path = config.out / ENVIRONMENT
    try:
        recorded = read_json(path)
        began = {f"data.sources.{name}": each for name, each in recorded["shards"].items()}
    except (UserError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error!r}), but tells which files the run was started with; restore "
            "it, or choose another out="
        ) from error
    found = {f"data.sources.{name}": each for name, each in hashes["shards"].items()}
    keys = {"tokenizer": "data.tokenizer", "vae": "data.vae", "vision_model": "objective.alignment.model"}
    for name, key in keys.items():
        found[key] = hashes.get(name)
        # Earlier versions recorded less.
        began[key] = recorded.get(name, None if key in changed else found[key])
    for key, value in found.items():
        if value != began.get(key):
            raise UserError(
                f"{key}: other files than {config.out} was started with; restore those, or choose another "
                "out= to train on these"
            )
    return recorded


def _shard_hashes(sources: dict[str, SourceConfig]) -> dict[str, list[str]]:
    return {
        name: [shard.sha256 for shard in load_manifest(source.path).shards]
        for name, source in sources.items()
    }


def load_run_config(folder: Path) -> RunConfig:
    """The frozen configuration of a run folder, with paths that are right in any working directory."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: no config.yaml, so not a run folder; `megafusion train` makes one")
    config, folder = load_config(RunConfig, path), folder.absolute()

    def find(frozen: Path) -> Path:
        # Where it lies if it was moved together with the run. In runs of earlier versions it may be relative
        # to where the run was started, as their `out` is.
        beside = Path(os.path.normpath(folder / os.path.relpath(frozen, config.out)))
        return frozen if frozen.is_absolute() and (frozen.exists() or not beside.exists()) else beside

    return _with_paths(config, folder, find)


def latest_config(folder: Path) -> RunConfig:
    """The frozen configuration, with the recipe keys that the latest attempt to make a step had changed."""
    values = load_run_config(folder).model_dump(mode="json")
    trained = (each for each in reversed(read_attempts(folder)) if each["step"] > each["resumed_at"])
    latest: dict = next(trained, {})
    for key, (_, value) in latest.get("changed", {}).items():
        if key in RECIPE_KEYS:
            section, name = key.split(".")
            values[section][name] = value
    return parse_config(RunConfig, values, str(folder))


def absolute_paths(config: RunConfig) -> RunConfig:
    """A configuration that means the same files from any working directory."""
    return _with_paths(config, config.out.absolute(), Path.absolute)


def _with_paths(config: RunConfig, out: Path, change: Callable[[Path], Path]) -> RunConfig:
    """A copy with other paths; URLs stay."""
    data = config.data

    def changed(sources: dict[str, SourceConfig]) -> dict[str, SourceConfig]:
        return {
            name: source
            if is_remote(source.path)
            else source.model_copy(update={"path": change(Path(source.path))})
            for name, source in sources.items()
        }

    paths = {"tokenizer": change(data.tokenizer), "vae": change(data.vae), "sources": changed(data.sources)}
    if data.validation:
        held_out = changed(data.validation.sources)
        paths["validation"] = data.validation.model_copy(update={"sources": held_out})
    data, train = data.model_copy(update=paths), config.train
    if train.init_from:
        train = train.model_copy(update={"init_from": change(train.init_from)})
    objective = config.objective
    if objective.alignment:
        aligned = objective.alignment.model_copy(update={"model": change(objective.alignment.model)})
        objective = objective.model_copy(update={"alignment": aligned})
    return config.model_copy(update={"out": out, "data": data, "train": train, "objective": objective})
