"""DeepSpeed's engine around this rank's stage of the model; the only room that knows its internals."""

import warnings

# DeepSpeed calls functions that torch deprecates; a user cannot act on that.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
