"""Parallelism, applied to the plain model from outside."""

import os
import warnings

import torch

# DeepSpeed would guess the same when it is loaded, and say on stdout that it did.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
# Names that DeepSpeed calls and torch 2.13 would like to see replaced: nothing that a user can act on.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
