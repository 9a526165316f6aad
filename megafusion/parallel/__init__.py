"""Parallelism, applied to the plain model from outside."""

import warnings

# Names that DeepSpeed calls and torch 2.13 would like to see replaced: nothing that a user can act on.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
