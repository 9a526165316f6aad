"""Parallelism, applied to the plain model from outside."""

import os

import torch

# DeepSpeed would guess the same when it is loaded, and say on stdout that it did.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
