"""The device of a process, also DeepSpeed's: modules import this one before deepspeed."""

import os
import resource

import torch

# DeepSpeed reads it when it is imported; otherwise it guesses the same, and prints that it did.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def default_device() -> torch.device:
    """This process's GPU, the first one unless it has selected another; the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for products of bf16; any that is not a CPU.

    A CPU without them is about 20 times as slow in bf16 as in float32.
    """
    if device.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def peak_memory_bytes() -> int:
    """Peak memory of this process so far: the GPU's where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
