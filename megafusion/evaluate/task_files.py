"""Task files of lm-evaluation-harness in a folder: checked, and loaded without a network."""

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megafusion.errors import UserError
from megafusion.storage import read_text

PYTHON_SEED, NUMPY_SEED, FEW_SHOT_SEED = 0, 1234, 1234
"""As lm-eval's command seeds them."""
SWITCHES = {
    "huggingface_hub.constants": "HF_HUB_OFFLINE",
    "datasets.config": "HF_HUB_OFFLINE",
    "evaluate.config": "HF_EVALUATE_OFFLINE",
}
"""Switches that turn the network off in the libraries that lm-eval loads data and metrics with."""
REFUSED = {"UNSAFE_CODE": "runs what the model writes", "MULTIMODAL": "asks about images"}
DATA = "give its data as files, as `dataset_path: json` with `dataset_kwargs: {data_files: FILE}`"


def load_tasks(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Tasks and groups of a folder, by name, as lm-eval's loop takes them; all tasks where none is named.

    Runs the code that the files name. UserError for a task that is not there, cannot be loaded, would be
    downloaded, or asks for more than texts; and where lm-eval is not installed.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"lm: needs lm-eval; pip install 'megafusion[eval]' ({error})") from error
    for path in sorted(folder.rglob("*.yaml")):
        _check_file(path)
    seed_tasks([])
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    if not manager.all_subtasks:
        raise UserError(f"task_folder: {folder}: holds no task file of lm-eval (.yaml with `task`)")
    if unknown := sorted(set(names) - set(manager.all_tasks)):
        raise UserError(f"tasks: {unknown[0]}: not in {folder}, which has {', '.join(manager.all_tasks)}")
    try:
        with offline():
            loaded = dict(manager.load(list(names or manager.all_subtasks)))
    except Exception as error:  # of the user's code and data, so of any kind
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{folder}: a task cannot be loaded ({reason:.500}); nothing is downloaded: {DATA}"
        ) from error
    for name, task in loaded["tasks"].items():
        for attribute, what in REFUSED.items():
            if getattr(task, attribute, False):
                raise UserError(f"tasks: {name}: {what}, which this suite does not; leave it out")
        metrics = {} if task.get_config("process_results") else getattr(task, "_metric_fn_list", {})
        if unknown := [metric for metric, function in metrics.items() if function is None]:
            raise UserError(f"tasks: {name}: lm-eval has no metric {unknown[0]}, and none is downloaded")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def seed_tasks(tasks: Iterable[Any]) -> None:
    """Make the next requests of tasks those that were made after the last call."""
    random.seed(PYTHON_SEED)
    np.random.seed(NUMPY_SEED)
    for task in tasks:
        task.set_fewshot_seed(FEW_SHOT_SEED)


@contextmanager
def offline() -> Iterator[None]:
    """No data set, metric or file of the Hub or of an address is fetched in the block."""
    modules = {import_module(name): switch for name, switch in SWITCHES.items()}
    before = {module: getattr(module, switch) for module, switch in modules.items()}
    try:
        for module, switch in modules.items():
            setattr(module, switch, True)
        yield
    finally:
        for module, switch in modules.items():
            setattr(module, switch, before[module])


def _check_file(path: Path) -> None:
    """UserError for a file that is no YAML, which lm-eval would leave out, or whose data have an address."""
    try:
        root = yaml.compose(read_text(path), yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(root, yaml.MappingNode):
        return
    for key, node in root.value:
        if key.value in ("dataset_path", "dataset_kwargs"):
            for text in _scalars(node):
                if re.match(r"[A-Za-z0-9+.-]+://", text):
                    raise UserError(f"{path}: {key.value}: {text:.200} is not fetched; {DATA}")


def _scalars(node: yaml.Node) -> Iterator[str]:
    if isinstance(node, yaml.ScalarNode):
        yield node.value
    elif isinstance(node, yaml.SequenceNode):
        for each in node.value:
            yield from _scalars(each)
    elif isinstance(node, yaml.MappingNode):
        for _, value in node.value:
            yield from _scalars(value)
