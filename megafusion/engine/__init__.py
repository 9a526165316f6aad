"""DeepSpeed's engine, and the only room that knows its internals."""

import os
import warnings

import torch

# DeepSpeed would guess the same when it is imported, and print that it did.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
# DeepSpeed calls functions that torch deprecates; a user cannot act on that.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
