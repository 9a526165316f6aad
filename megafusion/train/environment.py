"""The environment that a run starts in."""

import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist


def environment() -> dict:
    """The environment of a run beside its configuration and data: versions, devices, git state."""
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
    }


def _git(*arguments: str) -> str | None:
    """Output of git about the source tree; None outside a repository."""
    here = Path(__file__).parent
    try:
        answer = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
