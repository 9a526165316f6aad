"""The training step, the run around it, its checkpoints, averaged weights and metrics."""

import os

import torch

# DeepSpeed chooses its accelerator when it is first imported; told so, it does not warn about a CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
